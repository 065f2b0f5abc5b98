// A double of the CUDA driver for tests: device memory is host memory, kernels are not run but written down.
//
// A "cubin" here is a text of one digit an argument, its size in bytes (4 or 8), so that launches can be recorded.
// Graphs hold calls that the test registers while a stream is captured (fake_cuda_capture).
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

struct Library {
  std::string sizes;
};
struct Kernel {
  Library* library;
  std::string name;
};
struct Function {
  Kernel* kernel;
  int context;
};
struct Launch {
  std::string name;
  unsigned grid[3], block, shared;
  void* stream;
  std::vector<uint64_t> arguments;
};
using Call = void (*)(void*);
struct Graph {
  std::vector<std::pair<Call, void*>> calls;
};

std::vector<Launch> launches;
int context = 0;  // counts those that were destroyed
int64_t allocations = 0, synchronisations = 0, copies = 0, loads = 0;
Graph* captured = nullptr;
int graphs_launched = 0;
int broken = 0;  // what waiting and giving back answer, once it is not 0

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) {
  const char* wanted = std::getenv("FAKE_CUDA_DRIVER");
  *version = wanted != nullptr ? std::atoi(wanted) : 13000;
  return 0;
}
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDeviceGetName(char* name, int size, int) { std::strncpy(name, "Fake GPU", static_cast<size_t>(size)); return 0; }
int cuDeviceTotalMem_v2(size_t* size, int) { *size = size_t{1} << 30; return 0; }
int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) { *free_bytes = size_t{1} << 28; *total = size_t{1} << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const char* wanted = std::getenv("FAKE_CUDA_CAPABILITY");
  const int capability = wanted != nullptr ? std::atoi(wanted) : 90;
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &launches; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuGetErrorName(int status, const char** name) { *name = status == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_FAKE"; return 0; }
int cuGetErrorString(int, const char** text) { *text = "as the test asked for"; return 0; }

int cuMemAlloc_v2(uint64_t* address, size_t size) {
  ++allocations;
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, size) != 0) return 2;
  std::memset(memory, 0xA5, size);
  *address = reinterpret_cast<uint64_t>(memory);
  return 0;
}
int cuMemFree_v2(uint64_t address) { --allocations; std::free(reinterpret_cast<void*>(address)); return broken; }
int cuMemHostAlloc(void** address, size_t size, unsigned) { ++allocations; *address = std::calloc(size, 1); return *address == nullptr ? 2 : 0; }
int cuMemFreeHost(void* address) { --allocations; std::free(address); return broken; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, void*) { std::memcpy(reinterpret_cast<void*>(to), from, size); return 0; }
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void*) { std::memcpy(to, reinterpret_cast<void*>(from), size); return 0; }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void*) {
  ++copies;
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
  return 0;
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void*) { std::memset(reinterpret_cast<void*>(to), value, size); return 0; }
int cuStreamCreate(void** stream, unsigned) { *stream = &captured; return 0; }
int cuStreamDestroy_v2(void*) { return broken; }
int cuStreamSynchronize(void*) { ++synchronisations; return broken; }

int cuStreamBeginCapture_v2(void*, unsigned) { captured = new Graph; return 0; }
int cuStreamEndCapture(void*, void** graph) { *graph = captured; captured = nullptr; return 0; }
int cuGraphInstantiateWithFlags(void** executable, void* graph, uint64_t) { *executable = new Graph(*static_cast<Graph*>(graph)); return 0; }
int cuGraphDestroy(void* graph) { delete static_cast<Graph*>(graph); return 0; }
int cuGraphExecDestroy(void* graph) { delete static_cast<Graph*>(graph); return 0; }
int cuGraphLaunch(void* graph, void*) {
  ++graphs_launched;
  for (const auto& call : static_cast<Graph*>(graph)->calls) call.first(call.second);
  return 0;
}

int cuLibraryLoadData(void** library, const void* code, void*, void**, unsigned, void*, void**, unsigned) {
  ++loads;
  *library = new Library{static_cast<const char*>(code)};
  return 0;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) { *kernel = new Kernel{static_cast<Library*>(library), name}; return 0; }
int cuKernelGetFunction(void** function, void* kernel) { *function = new Function{static_cast<Kernel*>(kernel), context}; return 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned block, unsigned, unsigned, unsigned shared,
                   void* stream, void** arguments, void**) {
  if (x == 0 || y == 0 || z == 0) return 1;
  if (static_cast<Function*>(function)->context != context) return 400;
  const Kernel* kernel = static_cast<Function*>(function)->kernel;
  Launch launch = {kernel->name, {x, y, z}, block, shared, stream, {}};
  for (size_t i = 0; i < kernel->library->sizes.size(); ++i) {
    uint64_t value = 0;
    std::memcpy(&value, arguments[i], static_cast<size_t>(kernel->library->sizes[i] - '0'));
    launch.arguments.push_back(value);
  }
  launches.push_back(launch);
  return 0;
}

void fake_cuda_break(int status) { broken = status; }
int fake_cuda_capturing(void) { return captured != nullptr; }
void fake_cuda_capture(void (*call)(void*), void* data) { captured->calls.emplace_back(call, data); }
int fake_cuda_graphs_launched(void) { return graphs_launched; }
int64_t fake_cuda_allocations(void) { return allocations; }
int64_t fake_cuda_synchronisations(void) { return synchronisations; }
int64_t fake_cuda_copies(void) { return copies; }
int64_t fake_cuda_destroy_context(void) { return ++context; }
int64_t fake_cuda_loads(void) { return loads; }
int fake_cuda_launches(void) { return static_cast<int>(launches.size()); }
void fake_cuda_forget(void) { launches.clear(); }
const char* fake_cuda_launch(int index, unsigned grid[3], unsigned* block, void** stream, const uint64_t** arguments) {
  const Launch& launch = launches[static_cast<size_t>(index)];
  std::memcpy(grid, launch.grid, sizeof launch.grid);
  *block = launch.block;
  *stream = launch.stream;
  *arguments = launch.arguments.data();
  return launch.name.c_str();
}

}  // extern "C"
