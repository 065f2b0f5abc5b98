// Drives the plugin library as TensorRT does, over a mock registry and a double of the CUDA driver.
//
//   harness PLUGINS.so FAKE_CUDA.so FOLDER [TABLE]   (FAKE_CUDA.so is also what APAR_CUDA_DRIVER names)
//
// With a TABLE of real kernels (float16, head_dim 64, block_size 16, compute capability 9.0), only that they are found.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>

#include "gpu/launch_table.h"
#include "mock_nvinfer.h"
#include "tensorrt/exports.h"

using namespace nvinfer1;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int line) {
  if (holds) return;
  ++failures;
  std::printf("line %d: %s does not hold\n", line, what);
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

template <typename Function>
Function of(void* library, const char* name) {
  auto function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    std::printf("%s is missing\n", name);
    std::exit(2);
  }
  return function;
}

// ------------------------------------------------------------------ attributes

struct Attributes {
  int32_t abi_version = APAR_ABI_VERSION, num_heads = 8, num_kv_heads = 2, head_dim = 64, block_size = 16;
  float scale = 0.125F, rope_scale = 1.0F;
  std::vector<float> inv_freq = std::vector<float>(32, 0.5F);
  int32_t kv_binding = 0, engine_id = 5, layer = 1;
  std::vector<PluginField> list;

  PluginFieldCollection fields() {
    const auto integer = [](const char* name, const int32_t* value) {
      return PluginField{name, value, PluginFieldType::kINT32, 1};
    };
    list = {integer("abi_version", &abi_version), integer("num_heads", &num_heads), integer("num_kv_heads", &num_kv_heads),
            integer("head_dim", &head_dim), integer("block_size", &block_size),
            PluginField{"scale", &scale, PluginFieldType::kFLOAT32, 1},
            PluginField{"rope_scale", &rope_scale, PluginFieldType::kFLOAT32, 1},
            PluginField{"rope_inv_freq", inv_freq.data(), PluginFieldType::kFLOAT32, static_cast<int32_t>(inv_freq.size())},
            integer("kv_binding", &kv_binding), integer("engine_id", &engine_id), integer("layer", &layer),
            PluginField{"of_another_time", &layer, PluginFieldType::kINT32, 1}};
    return {static_cast<int32_t>(list.size()), list.data()};
  }
};

IPluginCreatorV3One* creator(const char* name) {
  return static_cast<IPluginCreatorV3One*>(getPluginRegistry()->getCreator(name, "1", ""));
}

IPluginV3* make(const char* name, Attributes attributes, TensorRTPhase phase) {
  const PluginFieldCollection fields = attributes.fields();
  return creator(name)->createPlugin("node", &fields, phase);
}

IPluginV3OneBuildV2* build_of(IPluginV3* plugin) {
  return static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
IPluginV3OneRuntime* run_of(IPluginV3* plugin) {
  return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// Every field's bytes, for comparison.
std::string serialised(IPluginV3* plugin) {
  std::string bytes;
  const PluginFieldCollection* fields = run_of(plugin)->getFieldsToSerialize();
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    bytes += std::string(field.name) + ":" + std::to_string(static_cast<int>(field.type)) + "=";
    bytes.append(static_cast<const char*>(field.data), 4 * static_cast<size_t>(field.length));
  }
  return bytes;
}

// ------------------------------------------------------------------ a step

struct Shapes {
  int64_t tokens = 6, rows = 4, width = 8, copies = 0, groups = 1, mask_rows = 1, words = 1, blocks = 32;
};

// Inputs of ForkAttention with pools in the network: the names and their order are plugins/tensorrt/fork_attention.cpp's.
std::vector<Dims> dims_of(const Attributes& a, const Shapes& s) {
  const auto dims = [](std::initializer_list<int64_t> sizes) {
    Dims d = {};
    for (const int64_t size : sizes) d.d[d.nbDims++] = size;
    return d;
  };
  const int64_t plan = 8 + 8 * 4096;
  return {dims({s.tokens, (a.num_heads + 2 * a.num_kv_heads) * a.head_dim}),
          dims({2, s.blocks, a.num_kv_heads, a.block_size, a.head_dim}), dims({s.tokens}), dims({s.rows + 1}),
          dims({s.rows}), dims({s.rows, s.width}), dims({s.tokens}), dims({2 + s.copies, 2}), dims({s.groups + 1}),
          dims({s.groups}), dims({s.mask_rows, s.words}), dims({plan}), dims({a.head_dim / 2}),
          dims({s.tokens, a.num_heads * a.head_dim}), dims({2, s.blocks, a.num_kv_heads, a.block_size, a.head_dim})};
}

DataType type_of(size_t position) {
  if (position <= 1 || position >= 13) return DataType::kHALF;
  return position == 12 ? DataType::kFLOAT : DataType::kINT32;
}

std::vector<DynamicPluginTensorDesc> dynamic(const Attributes& a, const Shapes& largest) {
  std::vector<DynamicPluginTensorDesc> list;
  for (const Dims& dims : dims_of(a, largest)) {
    DynamicPluginTensorDesc tensor = {};
    tensor.desc.type = type_of(list.size());
    tensor.desc.format = TensorFormat::kLINEAR;
    tensor.desc.dims = tensor.min = tensor.opt = tensor.max = dims;
    list.push_back(tensor);
  }
  return list;
}

std::vector<PluginTensorDesc> step(const Attributes& a, const Shapes& shapes) {
  std::vector<PluginTensorDesc> list;
  for (const DynamicPluginTensorDesc& tensor : dynamic(a, shapes)) list.push_back(tensor.desc);
  return list;
}

// ForkPlan's inputs among ForkAttention's.
constexpr int kPlanInputs[] = {3, 4, 6, 8, 9, 10};

// ------------------------------------------------------------------ a launch table for the double

std::string sizes_of(const std::vector<uint8_t>& arguments) {
  std::string sizes;
  for (const uint8_t code : arguments) sizes += code <= APAR_GPU_NULL || code >= APAR_GPU_LAYER_STRIDE ? '8' : '4';
  return sizes;
}

void write_table(const std::string& path, uint32_t sm) {
  struct Want {
    AparGpuKind kind;
    uint32_t tile;
    std::vector<uint8_t> arguments;
  };
  const std::vector<Want> wanted = {
      {APAR_GPU_COPY_READ, 0, {APAR_GPU_POOL, APAR_GPU_SLOT_COPIES, APAR_GPU_COPY_SCRATCH, APAR_GPU_NUM_COPIES, APAR_GPU_LAYER_STRIDE}},
      {APAR_GPU_COPY_WRITE, 0, {APAR_GPU_POOL, APAR_GPU_SLOT_COPIES, APAR_GPU_COPY_SCRATCH, APAR_GPU_NUM_COPIES, APAR_GPU_LAYER_STRIDE}},
      {APAR_GPU_ROPE_WRITE, 0, {APAR_GPU_QKV, APAR_GPU_Q, APAR_GPU_POOL, APAR_GPU_INV_FREQ, APAR_GPU_NUM_BLOCKS, APAR_GPU_ROPE_SCALE, APAR_GPU_NULL}},
      {APAR_GPU_PLAN, 0, {APAR_GPU_QUERY_START, APAR_GPU_STEP_PLAN, APAR_GPU_PLAN_SCRATCH, APAR_GPU_NUM_TOKENS, APAR_GPU_NUM_ROWS, APAR_GPU_NUM_GROUPS, APAR_GPU_MASKED}},
      {APAR_GPU_ATTEND, APAR_GPU_SMALL_TILE, {APAR_GPU_Q, APAR_GPU_POOL, APAR_GPU_STEP_PLAN, APAR_GPU_OUT, APAR_GPU_MASK_WORDS, APAR_GPU_SCALE, APAR_GPU_ITEMS}},
      {APAR_GPU_ATTEND, APAR_GPU_LARGE_TILE, {APAR_GPU_Q, APAR_GPU_POOL, APAR_GPU_STEP_PLAN, APAR_GPU_OUT, APAR_GPU_MASK_WORDS, APAR_GPU_SCALE, APAR_GPU_ITEMS}},
      {APAR_GPU_MERGE, 0, {APAR_GPU_STEP_PLAN, APAR_GPU_PART_OUT, APAR_GPU_PART_LSE, APAR_GPU_OUT}}};
  const char* names[] = {"", "copy_read", "copy_write", "rope_write", "plan", "attend", "merge"};
  std::string body(wanted.size() * sizeof(AparGpuKernel), '\0');
  for (size_t i = 0; i < wanted.size(); ++i) {
    AparGpuKernel entry = {};
    entry.kind = wanted[i].kind;
    entry.sm = sm;
    entry.dtype = wanted[i].kind == APAR_GPU_PLAN ? APAR_GPU_ANY : APAR_GPU_FLOAT16;
    entry.head_dim = wanted[i].kind == APAR_GPU_PLAN ? 0 : 64;
    entry.tile = wanted[i].tile;
    entry.num_warps = 4;
    entry.shared_bytes = wanted[i].tile * 1024;
    entry.argument_count = static_cast<uint32_t>(wanted[i].arguments.size());
    std::copy(wanted[i].arguments.begin(), wanted[i].arguments.end(), entry.arguments);
    std::strcpy(entry.symbol, (std::string(names[entry.kind]) + (wanted[i].tile ? std::to_string(wanted[i].tile) : "")).c_str());
    const std::string cubin = sizes_of(wanted[i].arguments);
    entry.cubin_offset = sizeof(AparGpuTableHeader) + body.size();
    entry.cubin_size = cubin.size() + 1;
    body += cubin;
    body.append(16 - cubin.size() % 16, '\0');
    std::memcpy(&body[i * sizeof entry], &entry, sizeof entry);
  }
  AparGpuTableHeader header = {};
  std::strcpy(header.magic, APAR_GPU_TABLE_MAGIC);
  header.version = APAR_GPU_TABLE_VERSION;
  header.abi_version = APAR_ABI_VERSION;
  header.header_size = sizeof header;
  header.entry_size = sizeof(AparGpuKernel);
  header.entry_count = static_cast<uint32_t>(wanted.size());
  header.file_size = sizeof header + body.size();
  header.checksum = apar_gpu_checksum(body.data(), body.size());
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&header), sizeof header);
  file << body;
}

// ------------------------------------------------------------------ tests

void creation() {
  for (const char* name : {"ForkAttention", "ForkPlan", "AllReduce", "AllGather"}) {
    EXPECT(creator(name) != nullptr);
    EXPECT(std::string(creator(name)->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE");
    EXPECT(creator(name)->getFieldNames()->nbFields > 0);
  }
  Attributes a;
  IPluginV3* plugin = make("ForkAttention", a, TensorRTPhase::kBUILD);
  EXPECT(plugin != nullptr);
  auto* core = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
  EXPECT(std::string(core->getPluginName()) == "ForkAttention" && std::string(core->getPluginNamespace()).empty());
  EXPECT(std::string(build_of(plugin)->getInterfaceInfo().kind) == "PLUGIN_V3ONE_BUILD" && build_of(plugin)->getInterfaceInfo().major == 2);
  delete plugin;

  a.abi_version = APAR_ABI_VERSION + 1;
  EXPECT(make("ForkAttention", a, TensorRTPhase::kBUILD) == nullptr);
  EXPECT(make("ForkPlan", a, TensorRTPhase::kRUNTIME) == nullptr);
  for (const auto& spoil : {+[](Attributes* x) { x->num_kv_heads = 3; }, +[](Attributes* x) { x->head_dim = 63; },
                            +[](Attributes* x) { x->inv_freq.pop_back(); }, +[](Attributes* x) { x->kv_binding = 3; },
                            +[](Attributes* x) { x->scale = 0.0F; }, +[](Attributes* x) { x->block_size = 0; }}) {
    Attributes wrong;
    spoil(&wrong);
    EXPECT(make("ForkAttention", wrong, TensorRTPhase::kBUILD) == nullptr);
  }
  const PluginFieldCollection none = {0, nullptr};
  EXPECT(creator("ForkAttention")->createPlugin("node", &none, TensorRTPhase::kBUILD) == nullptr);
  EXPECT(creator("ForkAttention")->createPlugin("node", nullptr, TensorRTPhase::kBUILD) == nullptr);
  const float wrong_type = 8.0F;
  Attributes b;
  PluginFieldCollection fields = b.fields();
  b.list[1] = PluginField{"num_heads", &wrong_type, PluginFieldType::kFLOAT32, 1};
  EXPECT(creator("ForkAttention")->createPlugin("node", &fields, TensorRTPhase::kBUILD) == nullptr);
}

void round_trip() {
  for (const char* name : {"ForkAttention", "ForkPlan"}) {
    Attributes a;
    a.kv_binding = 1;
    a.inv_freq[7] = 0.75F;
    IPluginV3* plugin = make(name, a, TensorRTPhase::kBUILD);
    const std::string before = serialised(plugin);
    IPluginV3* loaded = creator(name)->createPlugin("node", run_of(plugin)->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
    EXPECT(loaded != nullptr && serialised(loaded) == before);
    IPluginV3* copy = plugin->clone();
    const PluginFieldCollection* listed = run_of(copy)->getFieldsToSerialize();
    delete plugin;  // a clone stands on its own
    EXPECT(listed->nbFields > 0 && serialised(copy) == before);
    delete copy;
    delete loaded;
  }
}

void formats_and_aliases() {
  for (const int32_t binding : {0, 1, 2}) {
    Attributes a;
    a.kv_binding = binding;
    IPluginV3* plugin = make("ForkAttention", a, TensorRTPhase::kBUILD);
    IPluginV3OneBuildV2* build = build_of(plugin);
    EXPECT(build->getNbOutputs() == (binding == 2 ? 1 : 2));
    EXPECT(build->getAliasedInput(0) == -1 && build->getAliasedInput(1) == (binding == 1 ? 1 : -1));
    auto tensors = dynamic(a, Shapes());
    int32_t inputs = 13, outputs = 2;
    if (binding == 2) {
      tensors.erase(tensors.begin() + 1);
      tensors.pop_back();
      inputs = 12, outputs = 1;
    }
    for (int32_t i = 0; i < inputs + outputs; ++i) {
      EXPECT(build->supportsFormatCombination(i, tensors.data(), inputs, outputs));
      auto wrong = tensors;
      wrong[static_cast<size_t>(i)].desc.format = TensorFormat::kCHW4;
      EXPECT(!build->supportsFormatCombination(i, wrong.data(), inputs, outputs));
      wrong = tensors;
      wrong[static_cast<size_t>(i)].desc.type = wrong[static_cast<size_t>(i)].desc.type == DataType::kINT32 ? DataType::kINT64 : DataType::kINT8;
      EXPECT(!build->supportsFormatCombination(i, wrong.data(), inputs, outputs));
    }
    EXPECT(!build->supportsFormatCombination(0, tensors.data(), inputs - 1, outputs));
    EXPECT(!build->supportsFormatCombination(inputs + outputs, tensors.data(), inputs, outputs));
    tensors[0].desc.type = DataType::kBF16;  // one type for all: past_kv is still kHALF
    EXPECT(build->supportsFormatCombination(0, tensors.data(), inputs, outputs));
    if (binding != 2) EXPECT(!build->supportsFormatCombination(1, tensors.data(), inputs, outputs));
    tensors[0].desc.type = DataType::kFLOAT;
    EXPECT(!build->supportsFormatCombination(0, tensors.data(), inputs, outputs));
    DataType in[13], out[2];
    for (size_t i = 0; i < 13; ++i) in[i] = type_of(binding == 2 && i > 0 ? i + 1 : i);
    EXPECT(build->getOutputDataTypes(out, outputs, in, inputs) == 0 && out[0] == DataType::kHALF);
    EXPECT(build->configurePlugin(tensors.data(), inputs, nullptr, outputs) == 0);
    tensors[0].max.d[1] += 1;
    EXPECT(build->configurePlugin(tensors.data(), inputs, nullptr, outputs) != 0);
    delete plugin;
  }
}

void shapes() {
  mock::Builder builder;
  const auto exprs = [&](const std::vector<Dims>& dims) {
    std::vector<DimsExprs> list(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) {
      list[i].nbDims = dims[i].nbDims;
      for (int32_t j = 0; j < dims[i].nbDims; ++j) list[i].d[j] = builder.constant(dims[i].d[j]);
    }
    return list;
  };
  Attributes a;
  IPluginV3* plugin = make("ForkAttention", a, TensorRTPhase::kBUILD);
  auto in = exprs(dims_of(a, Shapes()));
  DimsExprs out[2] = {};
  EXPECT(build_of(plugin)->getOutputShapes(in.data(), 13, nullptr, 0, out, 2, builder) == 0);
  EXPECT(out[0].nbDims == 2 && out[0].d[0]->getConstantValue() == 6 && out[0].d[1]->getConstantValue() == 512);
  EXPECT(out[1].nbDims == 5 && out[1].d[1]->getConstantValue() == 32 && out[1].d[3]->getConstantValue() == 16);
  EXPECT(build_of(plugin)->getOutputShapes(in.data(), 12, nullptr, 0, out, 2, builder) != 0);

  // Whatever the step is, the plan fits its tensor, and the workspace of the profile is enough.
  for (const int32_t heads : {2, 8, 40, 64}) {
    a.num_heads = heads;
    IPluginV3* plan = make("ForkPlan", a, TensorRTPhase::kBUILD);
    IPluginV3* attention = make("ForkAttention", a, TensorRTPhase::kBUILD);
    Shapes largest;
    largest.tokens = 6000, largest.rows = 300, largest.groups = 300, largest.copies = 64;
    const auto most = dynamic(a, largest);
    const size_t space = build_of(attention)->getWorkspaceSize(most.data(), 13, nullptr, 2);
    std::vector<DynamicPluginTensorDesc> plan_most;
    for (const int i : kPlanInputs) plan_most.push_back(most[static_cast<size_t>(i)]);
    const size_t scratch = build_of(plan)->getWorkspaceSize(plan_most.data(), 6, nullptr, 1);
    for (const int64_t tokens : {1, 2, 15, 16, 300, 600, 1024, 4096, 4097, 6000})
      for (const int64_t rows : {1, 2, 40, 300})
        for (const int64_t groups : {1, 7, 300}) {
          Shapes s;
          s.tokens = tokens, s.rows = rows, s.groups = groups, s.copies = 64;
          auto all = exprs(dims_of(a, s));
          std::vector<DimsExprs> some;
          for (const int i : kPlanInputs) some.push_back(all[static_cast<size_t>(i)]);
          DimsExprs room = {};
          EXPECT(build_of(plan)->getOutputShapes(some.data(), 6, nullptr, 0, &room, 1, builder) == 0);
          const AparGpuSizes sizes = apar_gpu_sizes(tokens, rows, groups, a.num_heads, a.num_kv_heads);
          EXPECT(room.nbDims == 1 && room.d[0]->getConstantValue() >= sizes.plan_size);
          const AparGpuWorkspace used = apar_gpu_workspace(&sizes, tokens, 64, a.num_heads, a.num_kv_heads, a.head_dim);
          EXPECT(static_cast<int64_t>(space) >= used.total + 4);
          EXPECT(static_cast<int64_t>(scratch) >= 4 * sizes.scratch_size);
        }
    delete plan;
    delete attention;
  }
  delete plugin;
}

struct Recorder {
  void* library;
  int count() const { return of<int (*)()>(library, "fake_cuda_launches")(); }
  void forget() const { of<void (*)()>(library, "fake_cuda_forget")(); }
  std::string names() const {
    std::string all;
    for (int i = 0; i < count(); ++i) all += (i > 0 ? " " : "") + name(i);
    return all;
  }
  std::string name(int i) const {
    unsigned grid[3], block;
    void* stream;
    const uint64_t* arguments;
    return launch(i, grid, &block, &stream, &arguments);
  }
  std::string launch(int i, unsigned grid[3], unsigned* block, void** stream, const uint64_t** arguments) const {
    return of<const char* (*)(int, unsigned*, unsigned*, void**, const uint64_t**)>(library, "fake_cuda_launch")(i, grid, block, stream, arguments);
  }
  int64_t number(const char* what) const { return of<int64_t (*)()>(library, what)(); }
};

void enqueueing(void* plugins, const Recorder& cuda, const std::string& folder) {
  const auto add = of<const char* (*)(const char*)>(plugins, "apar_tensorrt_add_kernels");
  const auto available = of<const char* (*)(int32_t)>(plugins, "apar_tensorrt_kernels");
  const auto counters = of<void (*)(int64_t*, int64_t*)>(plugins, "apar_tensorrt_counters");
  const std::string table = folder + "/kernels.table";

  Attributes a;
  Shapes s;
  std::vector<char> memory(1 << 22);
  std::vector<void const*> in;
  for (size_t i = 0; i < 13; ++i) in.push_back(&memory[i << 16]);
  void* out[2] = {&memory[14 << 16], const_cast<void*>(in[1])};
  int marker = 0;
  auto* stream = reinterpret_cast<cudaStream_t>(&marker);

  // The build phase touches nothing, whatever it is given.
  IPluginV3* building = make("ForkAttention", a, TensorRTPhase::kBUILD);
  IPluginV3* attached = run_of(building)->attachToContext(nullptr);
  EXPECT(attached != nullptr && attached != building);
  auto tensors = step(a, s);
  EXPECT(run_of(building)->enqueue(tensors.data(), tensors.data() + 13, nullptr, nullptr, nullptr, stream) == 0);
  EXPECT(run_of(attached)->enqueue(tensors.data(), tensors.data() + 13, nullptr, nullptr, nullptr, stream) == 0);
  EXPECT(cuda.count() == 0 && cuda.number("fake_cuda_loads") == 0);
  delete attached;
  delete building;

  // Without kernels no context is made; files that are no table, or a damaged one, are refused.
  IPluginV3* loaded = make("ForkAttention", a, TensorRTPhase::kRUNTIME);
  EXPECT(run_of(loaded)->attachToContext(nullptr) == nullptr);
  EXPECT(run_of(loaded)->enqueue(tensors.data(), tensors.data() + 13, in.data(), out, memory.data(), stream) != 0);
  EXPECT(available(90) != nullptr && add((folder + "/none").c_str()) != nullptr);
  write_table(table, 90);
  {
    std::fstream file(table, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-3, std::ios::end);
    file << '!';
  }
  EXPECT(std::string(add(table.c_str())).find("checksum") != std::string::npos);
  write_table(table, 80);
  EXPECT(add(table.c_str()) == nullptr && available(86) == nullptr && available(90) != nullptr);
  EXPECT(std::string(available(90)).find("9.0") != std::string::npos);
  EXPECT(run_of(loaded)->attachToContext(nullptr) == nullptr);
  const std::string right = folder + "/kernels90.table";
  write_table(right, 90);
  EXPECT(add(right.c_str()) == nullptr && available(90) == nullptr && available(100) != nullptr);

  IPluginV3* ready = run_of(loaded)->attachToContext(nullptr);
  EXPECT(ready != nullptr);
  if (ready == nullptr) return;
  delete loaded;  // a context's plugin stands on its own
  const int64_t allocations = cuda.number("fake_cuda_allocations"), waits = cuda.number("fake_cuda_synchronisations");
  const int64_t loads = cuda.number("fake_cuda_loads");

  // A plain decoding step: no copies, the small tile.
  EXPECT(run_of(ready)->onShapeChange(tensors.data(), 13, tensors.data() + 13, 2) == 0);
  EXPECT(run_of(ready)->enqueue(tensors.data(), tensors.data() + 13, in.data(), out, &memory[20 << 16], stream) == 0);
  EXPECT(cuda.names() == "rope_write attend16 merge");
  unsigned grid[3], block;
  void* on = nullptr;
  const uint64_t* arguments = nullptr;
  EXPECT(cuda.launch(0, grid, &block, &on, &arguments) == "rope_write");
  EXPECT(grid[0] == 6 && grid[1] == 2 && grid[2] == 1 && block == 128 && on == stream);
  EXPECT(arguments[0] == reinterpret_cast<uint64_t>(in[0]) && arguments[2] == reinterpret_cast<uint64_t>(in[1]));
  EXPECT(arguments[3] == reinterpret_cast<uint64_t>(in[12]) && arguments[4] == 32 && arguments[6] == 0);
  float rope_scale = 0.0F;
  std::memcpy(&rope_scale, &arguments[5], 4);
  EXPECT(rope_scale == 1.0F);
  cuda.launch(1, grid, &block, &on, &arguments);
  const AparGpuSizes sizes = apar_gpu_sizes(6, 4, 1, 8, 2);
  EXPECT(grid[0] == static_cast<unsigned>(sizes.items) && grid[1] == 2);
  EXPECT(arguments[2] == reinterpret_cast<uint64_t>(in[11]) && arguments[3] == reinterpret_cast<uint64_t>(out[0]));
  EXPECT(arguments[4] == 0 && static_cast<int64_t>(arguments[6]) == sizes.items);

  // Copies, drafts with a mask, and prefill with the large tile.
  cuda.forget();
  s.copies = 3, s.tokens = 200, s.mask_rows = 200, s.words = 7;
  tensors = step(a, s);
  EXPECT(run_of(ready)->enqueue(tensors.data(), tensors.data() + 13, in.data(), out, &memory[20 << 16], stream) == 0);
  EXPECT(cuda.names() == "copy_read copy_write rope_write attend64 merge");
  cuda.launch(0, grid, &block, &on, &arguments);
  EXPECT(grid[0] == 3 && arguments[1] == reinterpret_cast<uint64_t>(in[7]) + 16 && arguments[3] == 3 && arguments[4] == 0);
  cuda.launch(3, grid, &block, &on, &arguments);
  EXPECT(arguments[4] == 7);
  int64_t run = 0, copied = 0;
  counters(&run, &copied);
  EXPECT(run == 2 && copied == 0 && cuda.number("fake_cuda_copies") == 0);

  // Two addresses: the pool is copied first, and that is counted.
  cuda.forget();
  s = Shapes();
  s.blocks = 2;
  tensors = step(a, s);
  std::vector<char> elsewhere(2 * 2 * 2 * 2 * 16 * 64, 'x');
  void* moved[2] = {out[0], elsewhere.data()};
  memory[1 << 16] = 'p';
  EXPECT(run_of(ready)->enqueue(tensors.data(), tensors.data() + 13, in.data(), moved, &memory[20 << 16], stream) == 0);
  EXPECT(elsewhere[0] == 'p' && elsewhere.back() == 0);
  cuda.launch(0, grid, &block, &on, &arguments);
  EXPECT(arguments[2] == reinterpret_cast<uint64_t>(elsewhere.data()));
  counters(&run, &copied);
  EXPECT(run == 3 && copied == 1 && cuda.number("fake_cuda_copies") == 1);

  // A step without tokens launches nothing; shapes that do not fit are refused.
  cuda.forget();
  s.tokens = 0;
  tensors = step(a, s);
  EXPECT(run_of(ready)->enqueue(tensors.data(), tensors.data() + 13, in.data(), out, memory.data(), stream) == 0 && cuda.count() == 0);
  tensors[0].dims.d[1] = 5;
  EXPECT(run_of(ready)->onShapeChange(tensors.data(), 13, tensors.data() + 13, 2) != 0);
  EXPECT(cuda.number("fake_cuda_allocations") == allocations && cuda.number("fake_cuda_synchronisations") == waits);
  EXPECT(cuda.number("fake_cuda_loads") == loads);

  // Functions end with their context; the next execution context finds its own in the new one, nothing is loaded twice.
  tensors = step(a, Shapes());
  cuda.number("fake_cuda_destroy_context");
  EXPECT(run_of(ready)->enqueue(tensors.data(), tensors.data() + 13, in.data(), out, &memory[20 << 16], stream) != 0);
  IPluginV3* again = run_of(ready)->attachToContext(nullptr);
  EXPECT(again != nullptr);
  if (again == nullptr) return;
  EXPECT(run_of(again)->enqueue(tensors.data(), tensors.data() + 13, in.data(), out, &memory[20 << 16], stream) == 0);
  EXPECT(cuda.number("fake_cuda_loads") == loads);
  delete again;

  // bfloat16 has no kernels in this table.
  tensors = step(a, Shapes());
  tensors[0].type = DataType::kBF16;
  EXPECT(run_of(ready)->enqueue(tensors.data(), tensors.data() + 13, in.data(), out, memory.data(), stream) != 0);
  delete ready;

  // Bound pools: by engine and layer.
  const auto bind = of<int32_t (*)(int32_t, int32_t, void* const*, int64_t)>(plugins, "apar_tensorrt_bind_pools");
  const auto unbind = of<void (*)(int32_t)>(plugins, "apar_tensorrt_unbind_pools");
  a.kv_binding = 2;
  IPluginV3* whole = make("ForkAttention", a, TensorRTPhase::kRUNTIME);
  IPluginV3* bound = run_of(whole)->attachToContext(nullptr);
  tensors = step(a, Shapes());
  tensors.erase(tensors.begin() + 1);
  auto fewer = in;
  fewer.erase(fewer.begin() + 1);
  EXPECT(run_of(bound)->onShapeChange(tensors.data(), 12, tensors.data() + 12, 1) == 0);
  EXPECT(run_of(bound)->enqueue(tensors.data(), tensors.data() + 12, fewer.data(), out, memory.data(), stream) != 0);
  void* pools[] = {&memory[0], &memory[77 << 8]};
  EXPECT(bind(5, 2, pools, 9) == 0 && bind(5, 2, pools, 9) != 0);
  cuda.forget();
  EXPECT(run_of(bound)->enqueue(tensors.data(), tensors.data() + 12, fewer.data(), out, memory.data(), stream) == 0);
  cuda.launch(0, grid, &block, &on, &arguments);
  EXPECT(arguments[2] == reinterpret_cast<uint64_t>(pools[1]) && arguments[4] == 9);
  EXPECT(arguments[3] == reinterpret_cast<uint64_t>(in[12]));
  unbind(5);
  EXPECT(run_of(bound)->enqueue(tensors.data(), tensors.data() + 12, fewer.data(), out, memory.data(), stream) != 0);
  delete whole;
  delete bound;

  // ForkPlan.
  cuda.forget();
  IPluginV3* plan = make("ForkPlan", Attributes(), TensorRTPhase::kRUNTIME);
  IPluginV3* planning = run_of(plan)->attachToContext(nullptr);
  EXPECT(planning != nullptr);
  s = Shapes();
  const auto all = step(Attributes(), s);
  std::vector<PluginTensorDesc> some;
  std::vector<void const*> of_some;
  for (const int i : kPlanInputs) {
    some.push_back(all[static_cast<size_t>(i)]);
    of_some.push_back(in[static_cast<size_t>(i)]);
  }
  EXPECT(run_of(planning)->onShapeChange(some.data(), 6, nullptr, 1) == 0);
  EXPECT(run_of(planning)->enqueue(some.data(), nullptr, of_some.data(), out, memory.data(), stream) == 0);
  EXPECT(cuda.names() == "plan");
  cuda.launch(0, grid, &block, &on, &arguments);
  EXPECT(grid[0] == 1 && arguments[0] == reinterpret_cast<uint64_t>(in[3]) && arguments[1] == reinterpret_cast<uint64_t>(out[0]));
  EXPECT(arguments[3] == 6 && arguments[4] == 4 && arguments[5] == 1 && arguments[6] == 0);
  some[3].dims.d[0] = 5;
  EXPECT(run_of(planning)->onShapeChange(some.data(), 6, nullptr, 1) != 0);
  delete plan;
  delete planning;
}

void collectives() {
  const int32_t ranks = 4;
  const PluginField field = {"ranks", &ranks, PluginFieldType::kINT32, 1};
  const PluginFieldCollection fields = {1, &field}, none = {0, nullptr};
  mock::Builder builder;
  for (const char* name : {"AllReduce", "AllGather"}) {
    EXPECT(creator(name)->createPlugin("node", &none, TensorRTPhase::kBUILD) == nullptr);
    IPluginV3* plugin = creator(name)->createPlugin("node", &fields, TensorRTPhase::kBUILD);
    DimsExprs in = {}, out = {};
    in.nbDims = 2;
    in.d[0] = builder.constant(3);
    in.d[1] = builder.constant(5);
    EXPECT(build_of(plugin)->getOutputShapes(&in, 1, nullptr, 0, &out, 1, builder) == 0);
    const bool gathers = std::string(name) == "AllGather";
    EXPECT(out.nbDims == (gathers ? 3 : 2) && out.d[0]->getConstantValue() == (gathers ? 4 : 3));
    EXPECT(out.d[out.nbDims - 1]->getConstantValue() == 5);
    IPluginV3* loaded = creator(name)->createPlugin("node", run_of(plugin)->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
    EXPECT(loaded != nullptr && serialised(loaded) == serialised(plugin));
    PluginTensorDesc tensor = {};
    tensor.type = DataType::kHALF;
    EXPECT(run_of(loaded)->enqueue(&tensor, &tensor, nullptr, nullptr, nullptr, nullptr) != 0);  // nobody connected the ranks
    delete plugin;
    delete loaded;
  }
}

void real_table(void* plugins, const char* table) {
  const char* problem = of<const char* (*)(const char*)>(plugins, "apar_tensorrt_add_kernels")(table);
  std::printf("%s\n", problem != nullptr ? problem : "the table is read");
  EXPECT(problem == nullptr);
  for (const char* name : {"ForkAttention", "ForkPlan"}) {
    IPluginV3* loaded = make(name, Attributes(), TensorRTPhase::kRUNTIME);
    IPluginV3* ready = run_of(loaded)->attachToContext(nullptr);
    EXPECT(ready != nullptr);
    delete ready;
    delete loaded;
  }
  Attributes other;
  other.block_size = 32;
  IPluginV3* loaded = make("ForkAttention", other, TensorRTPhase::kRUNTIME);
  EXPECT(run_of(loaded)->attachToContext(nullptr) == nullptr);
  delete loaded;
}

}  // namespace

int main(int count, char** paths) {
  setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  void* cuda = dlopen(paths[2], RTLD_NOW);
  void* plugins = dlopen(paths[1], RTLD_NOW);
  if (cuda == nullptr || plugins == nullptr) {
    std::printf("%s\n", dlerror());
    return 2;
  }
  const std::string status = of<const char* (*)()>(plugins, "apar_tensorrt_status")();
  std::printf("TensorRT %d.%d headers: %s\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, status.c_str());
  if (creator("ForkAttention") == nullptr) return 3;
  if (count > 4) {
    real_table(plugins, paths[4]);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
  }
  creation();
  round_trip();
  formats_and_aliases();
  shapes();
  enqueueing(plugins, Recorder{cuda}, paths[3]);
  collectives();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
