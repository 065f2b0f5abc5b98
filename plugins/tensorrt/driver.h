// The CUDA driver, found at run time: neither its library nor its headers are needed to build.
#ifndef APAR_TENSORRT_DRIVER_H_
#define APAR_TENSORRT_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace apar {
namespace trt {

struct Driver {
  // Signatures as in cuda.h; handles are opaque pointers, a status of 0 is success.
  int (*ctx_get_device)(int* device);
  int (*device_get_attribute)(int* value, int attribute, int device);
  int (*library_load_data)(void** library, const void* code, void* jit_options, void** jit_values, unsigned jit_count,
                           void* options, void** values, unsigned count);
  int (*library_get_kernel)(void** kernel, void* library, const char* name);
  int (*kernel_get_function)(void** function, void* kernel);
  int (*func_set_attribute)(void* function, int attribute, int value);
  int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                       void** extra);
  int (*memcpy_device_async)(uint64_t target, uint64_t source, size_t size, void* stream);
  int (*get_error_name)(int status, const char** name);

  // The driver of this process; null, with the reason in `error`, where there is none.
  static const Driver* get(std::string* error);

  // "" for success, otherwise what failed and how.
  std::string failure(const char* what, int status) const;
};

}  // namespace trt
}  // namespace apar

#endif  // APAR_TENSORRT_DRIVER_H_
