#include "tensorrt/attention.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>

#include "fork_attention.h"

namespace apar {
namespace trt {
namespace {

struct Binding {
  std::vector<void*> pools;
  int64_t num_blocks;
};

std::mutex mutex;
std::map<int32_t, Binding>& bindings() {
  static auto* map = new std::map<int32_t, Binding>;
  return *map;
}
std::atomic<int64_t> layers_run{0}, layers_copied{0};

}  // namespace

void HeadShape::read(Fields* fields) {
  fields->read("abi_version", &abi_version);
  fields->read("num_heads", &num_heads);
  fields->read("num_kv_heads", &num_kv_heads);
  fields->read("head_dim", &head_dim);
  fields->read("block_size", &block_size);
}

std::string HeadShape::check() const {
  if (abi_version != APAR_ABI_VERSION)
    return "the engine was built for ForkAttention ABI " + std::to_string(abi_version) + ", this library has " +
           std::to_string(APAR_ABI_VERSION) + "; build the engine again with the installed apar";
  if (num_heads < 1 || num_kv_heads < 1 || num_heads % num_kv_heads != 0)
    return std::to_string(num_heads) + " heads cannot share " + std::to_string(num_kv_heads) + " key/value heads";
  if (num_heads / num_kv_heads > APAR_GPU_LARGE_TILE)
    return "more than " + std::to_string(APAR_GPU_LARGE_TILE) + " heads share a key/value head";
  if (head_dim < 2 || head_dim % 2 != 0) return "head_dim " + std::to_string(head_dim) + " is not even";
  if (block_size < 1) return "block_size " + std::to_string(block_size) + " is not positive";
  return {};
}

void HeadShape::list(std::vector<nvinfer1::PluginField>* fields) {
  for (const char* name : {"abi_version", "num_heads", "num_kv_heads", "head_dim", "block_size"})
    fields->emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
}

void HeadPlugin::list_fields() {
  add_field("abi_version", &heads_.abi_version);
  add_field("num_heads", &heads_.num_heads);
  add_field("num_kv_heads", &heads_.num_kv_heads);
  add_field("head_dim", &heads_.head_dim);
  add_field("block_size", &heads_.block_size);
}

std::string HeadPlugin::find_driver() {
  std::string problem;
  driver_ = Driver::get(&problem);
  return problem;
}

std::string LayerKernels::load(const Driver& driver, const HeadShape& heads, const Choice& choice) {
  LayerKernels found;
  const bool small = heads.num_heads / heads.num_kv_heads <= APAR_GPU_SMALL_TILE;
  const struct {
    AparGpuKind kind;
    uint32_t tile;
    Kernel* kernel;
  } wanted[] = {{APAR_GPU_COPY_READ, 0, &found.copy_read_},
                {APAR_GPU_COPY_WRITE, 0, &found.copy_write_},
                {APAR_GPU_ROPE_WRITE, 0, &found.rope_},
                {APAR_GPU_ATTEND, small ? APAR_GPU_SMALL_TILE : APAR_GPU_LARGE_TILE, &found.attend_small_},
                {APAR_GPU_ATTEND, APAR_GPU_LARGE_TILE, &found.attend_large_},
                {APAR_GPU_MERGE, 0, &found.merge_}};
  *this = {};
  for (const auto& one : wanted) {
    std::string problem = load_kernel(driver, one.kind, choice, one.tile, one.kernel);
    if (!problem.empty()) return problem;
  }
  *this = found;
  return {};
}

std::string LayerKernels::launch(const Driver& driver, const HeadShape& heads, const AparGpuSizes& sizes,
                                 int64_t tokens, int64_t copies, Arguments* arguments, void* stream) const {
  const Kernel* order[] = {&copy_read_, &copy_write_, &rope_,
                           sizes.tile == APAR_GPU_SMALL_TILE ? &attend_small_ : &attend_large_, &merge_};
  for (const Kernel* kernel : order) {
    const uint32_t kind = kernel->entry->kind;
    if (copies == 0 && (kind == APAR_GPU_COPY_READ || kind == APAR_GPU_COPY_WRITE)) continue;
    uint32_t grid[3];
    apar_gpu_grid(kind, &sizes, tokens, copies, heads.num_heads, heads.num_kv_heads, grid);
    std::string problem = apar::trt::launch(driver, *kernel, grid, arguments, stream);
    if (!problem.empty()) return problem;
  }
  return {};
}

AparGpuSizes largest_sizes(int64_t tokens, int64_t rows, int64_t groups, const HeadShape& heads) {
  const int64_t split = std::min<int64_t>(tokens, APAR_GPU_MAX_SPLIT_TOKENS);
  const int32_t per_group = heads.num_heads / heads.num_kv_heads;
  AparGpuSizes s = apar_gpu_sizes(split, rows, std::max<int64_t>(groups, 1), heads.num_heads, heads.num_kv_heads);
  const int32_t small = per_group <= APAR_GPU_SMALL_TILE ? APAR_GPU_SMALL_TILE / per_group : APAR_GPU_LARGE_TILE / per_group;
  const int64_t full = tokens / small;
  s.tiles = static_cast<int32_t>(rows + full + std::min(groups, rows / 2) + full);
  s.items = s.tiles + s.budget;
  s.parts = 2 * split + int64_t{s.budget} * (APAR_GPU_LARGE_TILE / per_group);
  s.plan_size = APAR_GPU_PLAN_HEADER + int64_t{APAR_GPU_ITEM_FIELDS} * s.items + APAR_GPU_PART_FIELDS * tokens;
  s.scratch_size = (tokens + 1) + (rows + 1) + 3 * (groups + 1) + 2 * (int64_t{s.tiles} + 1);
  return s;
}

std::string text(const nvinfer1::Dims& dims) {
  std::string out = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) out += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
  return out + "]";
}

bool bind_pools(int32_t engine_id, int32_t layers, void* const* pools, int64_t num_blocks) {
  const std::lock_guard<std::mutex> lock(mutex);
  return bindings().emplace(engine_id, Binding{std::vector<void*>(pools, pools + layers), num_blocks}).second;
}

void unbind_pools(int32_t engine_id) {
  const std::lock_guard<std::mutex> lock(mutex);
  bindings().erase(engine_id);
}

BoundPool bound_pool(int32_t engine_id, int32_t layer) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = bindings().find(engine_id);
  if (found == bindings().end() || layer < 0 || static_cast<size_t>(layer) >= found->second.pools.size()) return {};
  return {found->second.pools[static_cast<size_t>(layer)], found->second.num_blocks};
}

void count_layer(bool copied) {
  layers_run.fetch_add(1, std::memory_order_relaxed);
  if (copied) layers_copied.fetch_add(1, std::memory_order_relaxed);
}

void read_counters(int64_t* run, int64_t* copied) {
  *run = layers_run.load(std::memory_order_relaxed);
  *copied = layers_copied.load(std::memory_order_relaxed);
}

}  // namespace trt
}  // namespace apar
