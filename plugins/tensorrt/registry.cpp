// Registration with the TensorRT of the process, and the library's plain C functions.
//
// libnvinfer is not linked: it is found where the process has it. IPluginRegistry differs between major versions, and
// a plugin of the wrong one is lost without a word, so the version is asked for before anything is registered.
#include <dlfcn.h>

#include <cstdio>
#include <mutex>

#include "tensorrt/attention.h"
#include "tensorrt/exports.h"
#include "tensorrt/kernels.h"
#include "tensorrt/plugin.h"

namespace apar {
namespace trt {
namespace {

#define APAR_TEXT(x) APAR_TEXT_OF(x)
#define APAR_TEXT_OF(x) #x
constexpr const char* kOurLibrary = "libnvinfer.so." APAR_TEXT(NV_TENSORRT_MAJOR);
constexpr int32_t kMajorFactor = 10000;

void* symbol(const char* name) {
  // Python's package loads libnvinfer for itself alone, so the global scope may not have it.
  if (void* library = dlopen(kOurLibrary, RTLD_NOW | RTLD_NOLOAD)) return dlsym(library, name);
  return dlsym(RTLD_DEFAULT, name);
}

bool other_major_is_loaded(int32_t* major) {
  for (const int32_t candidate : {8, 9, 10, 11, 12}) {
    const std::string name = "libnvinfer.so." + std::to_string(candidate);
    if (candidate != NV_TENSORRT_MAJOR && dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD) != nullptr) {
      *major = candidate;
      return true;
    }
  }
  return false;
}

struct Registration {
  bool done = false;
  std::string status;
};

std::string wrong_major(int32_t major) {
  return "this library is for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + ", but TensorRT " +
         std::to_string(major) + " is running: load libapar_tensorrt" + std::to_string(major) + ".so instead";
}

void register_all(Registration* registration) {
  using nvinfer1::IPluginRegistry;
  const auto version = reinterpret_cast<int32_t (*)()>(symbol("getInferLibVersion"));
  const auto registry_of = reinterpret_cast<IPluginRegistry* (*)()>(symbol("getPluginRegistry"));
  if (version == nullptr || registry_of == nullptr) {
    int32_t major = 0;
    registration->status = other_major_is_loaded(&major) ? wrong_major(major) : "not registered: this process has no TensorRT";
    return;
  }
  const int32_t major = version() / kMajorFactor;
  if (major != NV_TENSORRT_MAJOR) {
    registration->status = wrong_major(major);
    return;
  }
  IPluginRegistry* registry = registry_of();
  for (nvinfer1::IPluginCreatorInterface* creator :
       {attention_creator(), plan_creator(), all_reduce_creator(), all_gather_creator()})
    if (registry == nullptr || !registry->registerCreator(*creator, kNamespace)) {
      registration->status = "TensorRT did not take the plugins; plugins of these names may be registered already";
      return;
    }
  registration->done = true;
  registration->status = "registered with TensorRT " + std::to_string(major);
}

const char* ensure_registered() {
  static std::mutex mutex;
  static auto* registration = new Registration;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!registration->done) register_all(registration);
  return registration->status.c_str();
}

// Loading the library registers its plugins: with dlopen, ctypes.CDLL or trtexec --staticPlugins.
[[maybe_unused]] const char* const at_load = ensure_registered();

const char* sentence(std::string problem) {
  static thread_local std::string kept;
  kept = std::move(problem);
  return kept.empty() ? nullptr : kept.c_str();
}

}  // namespace

void report(const std::string& message) noexcept {
  static const auto logger_of = reinterpret_cast<nvinfer1::ILogger* (*)()>(symbol("getLogger"));
  nvinfer1::ILogger* logger = logger_of != nullptr ? logger_of() : nullptr;
  if (logger != nullptr)
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
  else
    std::fprintf(stderr, "apar: %s\n", message.c_str());
}

}  // namespace trt
}  // namespace apar

extern "C" {

int32_t apar_tensorrt_major(void) { return NV_TENSORRT_MAJOR; }

int32_t apar_tensorrt_abi_version(void) { return APAR_ABI_VERSION; }

const char* apar_tensorrt_status(void) { return apar::trt::ensure_registered(); }

const char* apar_tensorrt_add_kernels(const char* path) { return apar::trt::sentence(apar::trt::add_table(path)); }

const char* apar_tensorrt_kernels(int32_t compute_capability) {
  return apar::trt::sentence(apar::trt::check_kernels(compute_capability));
}

int32_t apar_tensorrt_bind_pools(int32_t engine_id, int32_t layers, void* const* pools, int64_t num_blocks) {
  return apar::trt::bind_pools(engine_id, layers, pools, num_blocks) ? 0 : 1;
}

void apar_tensorrt_unbind_pools(int32_t engine_id) { apar::trt::unbind_pools(engine_id); }

void apar_tensorrt_counters(int64_t* run, int64_t* copied) { apar::trt::read_counters(run, copied); }

}  // extern "C"
