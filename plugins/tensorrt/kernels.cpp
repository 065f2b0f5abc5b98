#include "tensorrt/kernels.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "fork_attention.h"

namespace apar {
namespace trt {
namespace {

constexpr const char* kTableVariable = "APAR_GPU_TABLE";
constexpr const char* kTableName = "apar_gpu.table";
constexpr int kMajorAttribute = 75, kMinorAttribute = 76;
constexpr int kMaxSharedAttribute = 8;
constexpr uint32_t kFreeShared = 48 << 10;
constexpr uint32_t kThreadsPerWarp = 32;
constexpr const char* kDtypeNames[] = {"any dtype", "float16", "bfloat16"};  // by AparGpuDtype

struct Table {
  std::string path;
  std::vector<char> bytes;
  const AparGpuKernel* entries() const {
    return reinterpret_cast<const AparGpuKernel*>(bytes.data() + sizeof(AparGpuTableHeader));
  }
  uint32_t count() const { return reinterpret_cast<const AparGpuTableHeader*>(bytes.data())->entry_count; }
};

std::mutex mutex;
// Never destroyed: plugins may outlive static destructors.
std::vector<std::unique_ptr<Table>>& tables() {
  static auto* list = new std::vector<std::unique_ptr<Table>>;
  return *list;
}
// CUkernels: they belong to no context, so they outlive contexts. CUfunctions do not, and are not kept here.
std::map<const AparGpuKernel*, void*>& handles() {
  static auto* map = new std::map<const AparGpuKernel*, void*>;
  return *map;
}

std::string damaged(const std::string& path, const std::string& why) {
  return path + " is no table of GPU kernels for this library: " + why + "; make it again with python -m apar.plugins.gpu.pack";
}

std::string read_table(const std::string& path, Table* table) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return path + " cannot be read; it should hold the GPU kernels (python -m apar.plugins.gpu.pack -o FILE)";
  const std::streamoff size = file.tellg();
  table->path = path;
  table->bytes.resize(static_cast<size_t>(size));
  file.seekg(0);
  if (!file.read(table->bytes.data(), size)) return path + " cannot be read to its end";
  AparGpuTableHeader header;
  if (table->bytes.size() < sizeof header) return damaged(path, "it is too short");
  std::memcpy(&header, table->bytes.data(), sizeof header);
  if (std::memcmp(header.magic, APAR_GPU_TABLE_MAGIC, sizeof header.magic) != 0) return damaged(path, "it is another kind of file");
  if (header.version != APAR_GPU_TABLE_VERSION || header.header_size != sizeof header ||
      header.entry_size != sizeof(AparGpuKernel))
    return damaged(path, "it has version " + std::to_string(header.version) + ", this library reads " +
                             std::to_string(APAR_GPU_TABLE_VERSION));
  if (header.abi_version != APAR_ABI_VERSION)
    return damaged(path, "its kernels have ForkAttention ABI " + std::to_string(header.abi_version) + ", this library has " +
                             std::to_string(APAR_ABI_VERSION));
  const uint64_t begin = sizeof header + uint64_t{header.entry_count} * sizeof(AparGpuKernel);
  if (header.file_size != table->bytes.size() || begin > table->bytes.size()) return damaged(path, "it is truncated");
  if (apar_gpu_checksum(table->bytes.data() + sizeof header, table->bytes.size() - sizeof header) != header.checksum)
    return damaged(path, "its checksum is wrong");
  for (uint32_t i = 0; i < header.entry_count; ++i) {
    const AparGpuKernel& entry = table->entries()[i];
    if (entry.cubin_offset < begin || entry.cubin_offset > table->bytes.size() ||
        entry.cubin_size > table->bytes.size() - entry.cubin_offset || entry.argument_count > sizeof entry.arguments ||
        std::memchr(entry.symbol, 0, sizeof entry.symbol) == nullptr)
      return damaged(path, "entry " + std::to_string(i) + " points outside of it");
  }
  return {};
}

std::string add_locked(const std::string& path) {
  for (const std::unique_ptr<Table>& table : tables())
    if (table->path == path) return {};
  auto table = std::make_unique<Table>();
  std::string problem = read_table(path, table.get());
  if (problem.empty()) tables().push_back(std::move(table));
  return problem;
}

// Where nobody named a table: the environment's, or the one beside this library.
std::string add_default_locked() {
  if (!tables().empty()) return {};
  const char* given = std::getenv(kTableVariable);
  if (given != nullptr && *given != '\0') return add_locked(given);
  Dl_info info = {};
  if (dladdr(reinterpret_cast<const void*>(&add_table), &info) == 0 || info.dli_fname == nullptr)
    return "this library does not know its own place; set APAR_GPU_TABLE to a table of GPU kernels";
  const std::string self = info.dli_fname;
  const size_t slash = self.rfind('/');
  return add_locked((slash == std::string::npos ? std::string() : self.substr(0, slash + 1)) + kTableName);
}

// The entries' `sm` for a device: 8.x runs what was made for 8.0; later ones run exactly their own.
uint32_t entry_sm(int compute_capability) {
  return static_cast<uint32_t>(compute_capability / 10 == 8 ? 80 : compute_capability);
}

bool matches(uint32_t field, uint32_t wanted) { return field == 0 || field == wanted; }

const AparGpuKernel* find(AparGpuKind kind, uint32_t sm, const Choice& choice, uint32_t tile, uint32_t flags,
                          const Table** owner) {
  for (const std::unique_ptr<Table>& table : tables())
    for (uint32_t i = 0; i < table->count(); ++i) {
      const AparGpuKernel& e = table->entries()[i];
      if (e.kind == static_cast<uint32_t>(kind) && e.sm == sm && e.flags == flags && matches(e.dtype, choice.dtype) &&
          matches(e.head_dim, choice.head_dim) && matches(e.block_size, choice.block_size) && matches(e.tile, tile)) {
        *owner = table.get();
        return &e;
      }
    }
  return nullptr;
}

}  // namespace

std::string add_table(const std::string& path) {
  const std::lock_guard<std::mutex> lock(mutex);
  return add_locked(path);
}

std::string check_kernels(int compute_capability) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::string problem = add_default_locked();
  if (!problem.empty()) return problem;
  const uint32_t sm = entry_sm(compute_capability);
  for (const std::unique_ptr<Table>& table : tables())
    for (uint32_t i = 0; i < table->count(); ++i)
      if (table->entries()[i].sm == sm) return {};
  return "no table of GPU kernels has any for compute capability " + std::to_string(compute_capability / 10) + "." +
         std::to_string(compute_capability % 10) + "; make one with python -m apar.plugins.gpu.pack --sm " +
         std::to_string(sm);
}

std::string load_kernel(const Driver& driver, AparGpuKind kind, const Choice& choice, uint32_t tile, Kernel* kernel) {
  int device = 0, major = 0, minor = 0;
  std::string problem = driver.failure("cuCtxGetDevice", driver.ctx_get_device(&device));
  if (!problem.empty()) return problem;
  driver.device_get_attribute(&major, kMajorAttribute, device);
  driver.device_get_attribute(&minor, kMinorAttribute, device);
  problem = check_kernels(10 * major + minor);
  if (!problem.empty()) return problem;
  const std::lock_guard<std::mutex> lock(mutex);
  const Table* table = nullptr;
  const uint32_t sm = entry_sm(10 * major + minor);
  const AparGpuKernel* entry = find(kind, sm, choice, tile, APAR_GPU_CHECKED, &table);
  if (entry == nullptr) entry = find(kind, sm, choice, tile, 0, &table);
  if (entry == nullptr)
    return "no GPU kernel of kind " + std::to_string(kind) + " for " + kDtypeNames[choice.dtype] + ", head_dim " +
           std::to_string(choice.head_dim) + ", block_size " + std::to_string(choice.block_size) +
           " in the tables; make one with python -m apar.plugins.gpu.pack that has it";
  void*& handle = handles()[entry];
  if (handle == nullptr) {
    void *library = nullptr, *found = nullptr;
    const void* cubin = table->bytes.data() + entry->cubin_offset;
    problem = driver.failure("cuLibraryLoadData",
                             driver.library_load_data(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0));
    if (problem.empty())
      problem = driver.failure("cuLibraryGetKernel", driver.library_get_kernel(&found, library, entry->symbol));
    if (problem.empty()) handle = found;
  }
  // Also loads the code into the context now: with lazy loading the first launch would allocate and wait.
  void* function = nullptr;
  if (problem.empty()) problem = driver.failure("cuKernelGetFunction", driver.kernel_get_function(&function, handle));
  if (problem.empty() && entry->shared_bytes > kFreeShared)
    problem = driver.failure(
        "cuFuncSetAttribute",
        driver.func_set_attribute(function, kMaxSharedAttribute, static_cast<int>(entry->shared_bytes)));
  if (!problem.empty()) return table->path + ": kernel " + entry->symbol + ": " + problem;
  kernel->entry = entry;
  kernel->function = function;
  return {};
}

void Arguments::set_sizes(const AparGpuSizes& sizes) {
  set(APAR_GPU_ITEMS, int64_t{sizes.items});
  set(APAR_GPU_TILES, int64_t{sizes.tiles});
  set(APAR_GPU_BUDGET, int64_t{sizes.budget});
  set(APAR_GPU_TILE_TOKENS, int64_t{sizes.tile_tokens});
  set(APAR_GPU_HEADS_PER_GROUP, int64_t{sizes.heads_per_group});
  set(APAR_GPU_SPLITS, int64_t{sizes.splits});
}

std::string launch(const Driver& driver, const Kernel& kernel, const uint32_t grid[3], Arguments* arguments,
                   void* stream) {
  void* values[sizeof kernel.entry->arguments] = {};
  for (uint32_t i = 0; i < kernel.entry->argument_count; ++i) {
    const uint8_t code = kernel.entry->arguments[i];
    if (code <= APAR_GPU_NULL)
      values[i] = &arguments->pointers[code];
    else if (code < APAR_GPU_SCALE)
      values[i] = &arguments->integers[code - APAR_GPU_NUM_BLOCKS];
    else if (code < APAR_GPU_LAYER_STRIDE)
      values[i] = &arguments->floats[code - APAR_GPU_SCALE];
    else
      values[i] = &arguments->layer_stride;
  }
  return driver.failure("cuLaunchKernel",
                        driver.launch_kernel(kernel.function, grid[0], grid[1], grid[2],
                                             kThreadsPerWarp * kernel.entry->num_warps, 1, 1, kernel.entry->shared_bytes,
                                             stream, values, nullptr));
}

}  // namespace trt
}  // namespace apar
