// ForkAttention's GPU kernels out of launch tables (gpu/launch_table.h), loaded for a device.
#ifndef APAR_TENSORRT_KERNELS_H_
#define APAR_TENSORRT_KERNELS_H_

#include <cstdint>
#include <string>

#include "gpu/launch_table.h"
#include "tensorrt/driver.h"

namespace apar {
namespace trt {

// One kernel, ready to be launched.
struct Kernel {
  const AparGpuKernel* entry = nullptr;
  void* function = nullptr;
};

// What a plugin asks a kernel by. dtype is an AparGpuDtype.
struct Choice {
  uint32_t dtype;
  uint32_t head_dim;
  uint32_t block_size;
};

// Reads a table and adds its kernels to those that are searched. "" or what is wrong with the file.
std::string add_table(const std::string& path);

// "" if some table has kernels for devices of this compute capability (10 * major + minor), otherwise a sentence.
// Looks for the default tables where none was added.
std::string check_kernels(int compute_capability);

// Loads a kernel for the current device, checked builds first. `tile` is 0 for kinds that have none. "" or a sentence.
std::string load_kernel(const Driver& driver, AparGpuKind kind, const Choice& choice, uint32_t tile, Kernel* kernel);

// Values that a launch looks up by AparGpuArgument.
struct Arguments {
  void* pointers[APAR_GPU_NULL + 1] = {};
  int32_t integers[APAR_GPU_SCALE - APAR_GPU_NUM_BLOCKS] = {};
  float floats[APAR_GPU_LAYER_STRIDE - APAR_GPU_SCALE] = {};
  int64_t layer_stride = 0;

  void set(AparGpuArgument code, const void* pointer) { pointers[code] = const_cast<void*>(pointer); }
  void set(AparGpuArgument code, int64_t value) {
    integers[code - APAR_GPU_NUM_BLOCKS] = static_cast<int32_t>(value);
  }
  void set_float(AparGpuArgument code, float value) { floats[code - APAR_GPU_SCALE] = value; }
  // The sizes, and what a kernel may ask of the step's shapes.
  void set_sizes(const AparGpuSizes& sizes);
};

// Puts a kernel on the stream. "" or what failed. Allocates nothing and waits for nothing.
std::string launch(const Driver& driver, const Kernel& kernel, const uint32_t grid[3], Arguments* arguments,
                   void* stream);

}  // namespace trt
}  // namespace apar

#endif  // APAR_TENSORRT_KERNELS_H_
