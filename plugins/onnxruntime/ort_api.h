// What the operators of this library share of ONNX Runtime's C API. The C++ wrapper is left alone: its
// shape functions write dimensions that current runtimes reject, and nothing here needs exceptions.
#ifndef APAR_ONNXRUNTIME_ORT_API_H_
#define APAR_ONNXRUNTIME_ORT_API_H_

#include <onnxruntime_c_api.h>

#include <memory>
#include <string>
#include <vector>

#include "fork_attention.h"

// Hands a failing call's status to the caller.
#define APAR_ORT_TRY(call)                                 \
  do {                                                     \
    if (OrtStatus* status_of_call = (call)) return status_of_call; \
  } while (false)

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

// What an operator's own code says when it fails has room in this.
constexpr size_t kMessageSize = 512;

inline OrtStatus* failed(AparStatus status, const char* message) {
  return api->CreateStatus(status == APAR_OUT_OF_MEMORY ? ORT_FAIL : ORT_INVALID_ARGUMENT, message);
}

inline OrtStatus* read_int(const OrtKernelInfo* info, const char*, const char* name, int64_t* to) {
  return api->KernelInfoGetAttribute_int64(info, name, to);
}

inline OrtStatus* read_int(const OrtKernelInfo* info, const char* op, const char* name, int32_t* to) {
  int64_t value = 0;
  APAR_ORT_TRY(api->KernelInfoGetAttribute_int64(info, name, &value));
  *to = static_cast<int32_t>(value);
  if (*to != value) return error((std::string(op) + ": attribute " + name + " exceeds 32 bits").c_str());
  return nullptr;
}

inline std::string shape_text(const int64_t* dims, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i > 0 ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

inline std::string shape_text(const std::vector<int64_t>& dims) { return shape_text(dims.data(), dims.size()); }

// The shape of an operator's output while a graph is read. Names belong to unknown dimensions.
inline OrtStatus* set_shape(OrtShapeInferContext* context, size_t index, ONNXTensorElementDataType type,
                            std::vector<int64_t> dims, std::vector<const char*> names) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  APAR_ORT_TRY(api->CreateTensorTypeAndShapeInfo(&raw));
  const ShapeInfo info(raw);
  APAR_ORT_TRY(api->SetTensorElementType(raw, type));
  // Unknown dimensions must be -1 and carry their name apart.
  for (int64_t& dim : dims) dim = dim < 0 ? -1 : dim;
  APAR_ORT_TRY(api->SetDimensions(raw, dims.data(), dims.size()));
  APAR_ORT_TRY(api->SetSymbolicDimensions(raw, names.data(), names.size()));
  return api->ShapeInferContext_SetOutputTypeShape(context, index, raw);
}

inline OrtStatus* attribute(OrtShapeInferContext* context, const char* name, int64_t* value) {
  const OrtOpAttr* attr = nullptr;
  APAR_ORT_TRY(api->ShapeInferContext_GetAttribute(context, name, &attr));
  size_t size = 0;
  return api->ReadOpAttr(attr, ORT_OP_ATTR_INT, value, sizeof *value, &size);
}

// What all operators of this library have in common; the rest is null.
inline OrtCustomOp common_op() {
  OrtCustomOp op = {};
  op.version = kApiVersion;
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

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

#endif  // APAR_ONNXRUNTIME_ORT_API_H_
