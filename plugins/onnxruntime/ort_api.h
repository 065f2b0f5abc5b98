// What the operators of this library share of ONNX Runtime's C API. The C++ wrapper is left alone: its
// shape functions write dimensions that current runtimes reject, and nothing here needs exceptions.
#ifndef APAR_ONNXRUNTIME_ORT_API_H_
#define APAR_ONNXRUNTIME_ORT_API_H_

#include <onnxruntime_c_api.h>

#include <memory>

namespace apar {
namespace ort {

// The first version of the API (ONNX Runtime 1.21) that this library runs with. Later runtimes serve it.
constexpr uint32_t kApiVersion = 21;
static_assert(ORT_API_VERSION >= kApiVersion, "headers of ONNX Runtime 1.21 or later are needed");

constexpr const char* kDomain = "apar";

// Set by RegisterCustomOps before anything else runs.
extern const OrtApi* api;

struct Release {
  void operator()(OrtTensorTypeAndShapeInfo* info) const { api->ReleaseTensorTypeAndShapeInfo(info); }
};
using ShapeInfo = std::unique_ptr<OrtTensorTypeAndShapeInfo, Release>;

inline OrtStatus* error(const char* message) { return api->CreateStatus(ORT_INVALID_ARGUMENT, message); }

// The session's own threads. Tasks are coarse, so each is a batch of its own and threads take them as
// they come.
inline void parallel_for(void* context, void (*body)(void*, size_t), size_t total, void* data) {
  OrtStatus* status =
      api->KernelContext_ParallelFor(static_cast<const OrtKernelContext*>(context), body, total, total, data);
  if (status == nullptr) return;
  // It fails only before it has started anything.
  api->ReleaseStatus(status);
  for (size_t i = 0; i < total; ++i) body(data, i);
}

// Each operator adds itself (one custom op for each element type of the pool) to the domain.
OrtStatus* add_fork_attention(OrtCustomOpDomain* domain);
OrtStatus* add_linear(OrtCustomOpDomain* domain);

}  // namespace ort
}  // namespace apar

// Hands a failing call's status to the caller.
#define APAR_ORT_TRY(call)                                 \
  do {                                                     \
    if (OrtStatus* status_of_call = (call)) return status_of_call; \
  } while (false)

#endif  // APAR_ONNXRUNTIME_ORT_API_H_
