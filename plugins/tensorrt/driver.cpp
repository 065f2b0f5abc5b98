#include "tensorrt/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>

namespace apar {
namespace trt {
namespace {

constexpr const char* kLibraryVariable = "APAR_CUDA_DRIVER";

template <typename Function>
bool find(void* library, const char* name, Function* function, std::string* error) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function == nullptr) *error = std::string("the CUDA driver lacks ") + name + "; APAR needs one for CUDA 12 or later";
  return *function != nullptr;
}

bool load(Driver* driver, std::string* error) {
  const char* given = std::getenv(kLibraryVariable);
  const char* name = given != nullptr && *given != '\0' ? given : "libcuda.so.1";
  void* library = dlopen(name, RTLD_NOW);
  if (library == nullptr) {
    *error = std::string("the CUDA driver cannot be loaded: ") + dlerror();
    return false;
  }
  return find(library, "cuCtxGetDevice", &driver->ctx_get_device, error) &&
         find(library, "cuDeviceGetAttribute", &driver->device_get_attribute, error) &&
         find(library, "cuLibraryLoadData", &driver->library_load_data, error) &&
         find(library, "cuLibraryGetKernel", &driver->library_get_kernel, error) &&
         find(library, "cuKernelGetFunction", &driver->kernel_get_function, error) &&
         find(library, "cuFuncSetAttribute", &driver->func_set_attribute, error) &&
         find(library, "cuLaunchKernel", &driver->launch_kernel, error) &&
         find(library, "cuMemcpyDtoDAsync_v2", &driver->memcpy_device_async, error) &&
         find(library, "cuGetErrorName", &driver->get_error_name, error);
}

}  // namespace

const Driver* Driver::get(std::string* error) {
  static std::mutex mutex;
  static Driver driver;
  static bool loaded = false;
  const std::lock_guard<std::mutex> lock(mutex);
  loaded = loaded || load(&driver, error);
  return loaded ? &driver : nullptr;
}

std::string Driver::failure(const char* what, int status) const {
  if (status == 0) return {};
  const char* name = nullptr;
  get_error_name(status, &name);
  return std::string(what) + " failed: " + (name != nullptr ? name : "unknown error") + " (" + std::to_string(status) + ")";
}

}  // namespace trt
}  // namespace apar
