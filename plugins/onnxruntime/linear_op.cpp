// Linear as an ONNX Runtime custom op: types, shapes, attributes. What the operator does is in linear.h and cpu/.
#include "linear.h"

#include <array>
#include <string>
#include <vector>

#include "onnxruntime/ort_api.h"

namespace apar {
namespace ort {
namespace {

enum Input : size_t { kX, kWeight, kScales, kZeros, kBias, kNorm, kResidual, kInputs };
constexpr const char* kName[kInputs] = {"x", "weight", "scales", "zeros", "bias", "norm", "residual"};

OrtStatus* wrong(size_t index, const std::string& rule) {
  return error(("Linear: " + std::string(kName[index]) + " " + rule).c_str());
}

// ------------------------------------------------------------------ tensors

struct Tensor {
  const void* data = nullptr;  // null: an optional input that is not there
  std::vector<int64_t> dims;
  int64_t count = 0;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
};

OrtStatus* read_input(OrtKernelContext* context, size_t index, Tensor* tensor) {
  const OrtValue* value = nullptr;
  APAR_ORT_TRY(api->KernelContext_GetInput(context, index, &value));
  if (value == nullptr) return nullptr;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  APAR_ORT_TRY(api->GetTensorTypeAndShape(value, &raw));
  const ShapeInfo info(raw);
  size_t rank = 0, count = 0;
  APAR_ORT_TRY(api->GetDimensionsCount(raw, &rank));
  tensor->dims.resize(rank);
  APAR_ORT_TRY(api->GetDimensions(raw, tensor->dims.data(), rank));
  APAR_ORT_TRY(api->GetTensorShapeElementCount(raw, &count));
  tensor->count = static_cast<int64_t>(count);
  APAR_ORT_TRY(api->GetTensorElementType(raw, &tensor->type));
  void* data = nullptr;
  APAR_ORT_TRY(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor->data = data;
  return nullptr;
}

// Optional inputs of one type and size.
OrtStatus* check_input(const Tensor* in, size_t index, ONNXTensorElementDataType type, int64_t count) {
  if (in[index].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) return nullptr;
  if (in[index].type != type) return wrong(index, "has an element type that is not the contract's");
  if (in[index].count != count)
    return wrong(index, "has shape " + shape_text(in[index].dims) + ", it must have " + std::to_string(count) +
                            " elements for this node's in_features, out_features and group_size");
  return nullptr;
}

OrtStatus* check_matrix(const Tensor& tensor, size_t index, int64_t rows, int64_t columns) {
  if (tensor.dims.size() == 2 && (rows < 0 || tensor.dims[0] == rows) && tensor.dims[1] == columns) return nullptr;
  const std::string first = rows < 0 ? "T" : std::to_string(rows);
  return wrong(index, "has shape " + shape_text(tensor.dims) + ", it must be [" + first + ", " +
                          std::to_string(columns) + "]");
}

// ------------------------------------------------------------------ kernel

struct Kernel {
  AparLinearParams params = {};
  ONNXTensorElementDataType weight_type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  AparLinear* op = nullptr;
  AparLinearSizes sizes = {};

  Kernel() = default;
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;
  ~Kernel() { apar_linear_destroy(op); }
};

OrtStatus* weight_type(const OrtKernelInfo* info, ONNXTensorElementDataType* type) {
  OrtTypeInfo* raw = nullptr;
  APAR_ORT_TRY(api->KernelInfo_GetInputTypeInfo(info, kWeight, &raw));
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  OrtStatus* status = api->CastTypeInfoToTensorInfo(raw, &tensor);
  if (status == nullptr) status = api->GetTensorElementType(tensor, type);
  api->ReleaseTypeInfo(raw);
  return status;
}

OrtStatus* read_params(const OrtKernelInfo* info, Kernel* kernel) {
  AparLinearParams& p = kernel->params;
  // The version first: where it differs, everything else may mean something else.
  APAR_ORT_TRY(read_int(info, "Linear", "abi_version", &p.abi_version));
  if (p.abi_version != APAR_LINEAR_ABI_VERSION) return nullptr;
  APAR_ORT_TRY(read_int(info, "Linear", "in_features", &p.in_features));
  APAR_ORT_TRY(read_int(info, "Linear", "out_features", &p.out_features));
  APAR_ORT_TRY(read_int(info, "Linear", "group_size", &p.group_size));
  APAR_ORT_TRY(read_int(info, "Linear", "gated", &p.gated));
  APAR_ORT_TRY(api->KernelInfoGetAttribute_float(info, "norm_epsilon", &p.norm_epsilon));
  int64_t bits = 0;
  APAR_ORT_TRY(read_int(info, "Linear", "bits", &bits));
  APAR_ORT_TRY(weight_type(info, &kernel->weight_type));
  switch (kernel->weight_type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      p.format = APAR_LINEAR_FLOAT32;
      return nullptr;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      p.format = APAR_LINEAR_FLOAT16;
      return nullptr;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      p.format = APAR_LINEAR_BFLOAT16;
      return nullptr;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
      p.format = bits == 4 ? APAR_LINEAR_INT4 : APAR_LINEAR_INT8;
      if (bits == 4 || bits == 8) return nullptr;
      return error(("Linear: bits = " + std::to_string(bits) + " must be 4 or 8 for a weight of bytes").c_str());
    default:
      return wrong(kWeight, "must be float32, float16, bfloat16 or uint8");
  }
}

OrtStatus* ORT_API_CALL create_kernel(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** to) {
  *to = nullptr;
  try {
    auto kernel = std::make_unique<Kernel>();
    APAR_ORT_TRY(read_params(info, kernel.get()));
    char message[kMessageSize];
    const AparStatus status = apar_linear_create(&kernel->params, &kernel->op, message, sizeof message);
    if (status != APAR_OK) return failed(status, message);
    kernel->sizes = apar_linear_sizes(kernel->op);
    *to = kernel.release();
    return nullptr;
  } catch (const std::exception& problem) {
    return api->CreateStatus(ORT_FAIL, problem.what());
  }
}

void ORT_API_CALL destroy_kernel(void* kernel) { delete static_cast<Kernel*>(kernel); }

OrtStatus* check(const Kernel& kernel, const Tensor* in) {
  const AparLinearParams& p = kernel.params;
  constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  for (const size_t needed : {size_t{kX}, size_t{kWeight}})
    if (in[needed].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) return wrong(needed, "is missing");
  if (in[kX].type != kFloat) return wrong(kX, "must be float32");
  APAR_ORT_TRY(check_matrix(in[kX], kX, -1, p.in_features * (p.gated ? 2 : 1)));
  APAR_ORT_TRY(check_input(in, kWeight, kernel.weight_type, kernel.sizes.weight));
  if (kernel.sizes.scales > 0 && in[kScales].data == nullptr)
    return wrong(kScales, "is missing, and a weight of integers needs it");
  APAR_ORT_TRY(check_input(in, kScales, p.group_size > 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : kFloat,
                           kernel.sizes.scales));
  APAR_ORT_TRY(check_input(in, kZeros, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, kernel.sizes.zeros));
  APAR_ORT_TRY(check_input(in, kBias, kFloat, p.out_features));
  APAR_ORT_TRY(check_input(in, kNorm, kFloat, p.in_features));
  if (in[kResidual].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) return nullptr;
  if (in[kResidual].type != kFloat) return wrong(kResidual, "must be float32");
  return check_matrix(in[kResidual], kResidual, in[kX].dims[0], p.out_features);
}

OrtStatus* ORT_API_CALL compute(void* self, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  try {
    size_t given = 0;
    APAR_ORT_TRY(api->KernelContext_GetInputCount(context, &given));
    Tensor in[kInputs];
    for (size_t i = 0; i < kInputs && i < given; ++i) APAR_ORT_TRY(read_input(context, i, &in[i]));
    APAR_ORT_TRY(check(kernel, in));
    const std::array<int64_t, 2> dims = {in[kX].dims[0], kernel.params.out_features};
    OrtValue* y = nullptr;
    APAR_ORT_TRY(api->KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &y));
    void* data = nullptr;
    APAR_ORT_TRY(api->GetTensorMutableData(y, &data));
    AparLinearTensors t = {};
    t.num_tokens = dims[0];
    t.x = static_cast<const float*>(in[kX].data);
    t.weight = in[kWeight].data;
    t.scales = in[kScales].data;
    t.zeros = static_cast<const uint8_t*>(in[kZeros].data);
    t.bias = static_cast<const float*>(in[kBias].data);
    t.norm = static_cast<const float*>(in[kNorm].data);
    t.residual = static_cast<const float*>(in[kResidual].data);
    t.y = static_cast<float*>(data);
    char message[kMessageSize];
    const AparStatus status = apar_linear_run(kernel.op, &t, &parallel_for, context, message, sizeof message);
    return status == APAR_OK ? nullptr : failed(status, message);
  } catch (const std::exception& problem) {
    return api->CreateStatus(ORT_FAIL, problem.what());
  }
}

// ------------------------------------------------------------------ shapes

OrtStatus* ORT_API_CALL infer_shapes(const OrtCustomOp*, OrtShapeInferContext* context) {
  try {
    OrtTensorTypeAndShapeInfo* x = nullptr;  // belongs to the context
    APAR_ORT_TRY(api->ShapeInferContext_GetInputTypeShape(context, kX, &x));
    size_t rank = 0;
    APAR_ORT_TRY(api->GetDimensionsCount(x, &rank));
    if (rank != 2) return nullptr;
    std::array<int64_t, 2> dims;
    std::array<const char*, 2> names;
    APAR_ORT_TRY(api->GetDimensions(x, dims.data(), rank));
    APAR_ORT_TRY(api->GetSymbolicDimensions(x, names.data(), rank));
    APAR_ORT_TRY(attribute(context, "out_features", &dims[1]));
    return set_shape(context, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {dims[0], dims[1]}, {names[0], ""});
  } catch (const std::exception& problem) {
    return api->CreateStatus(ORT_FAIL, problem.what());
  }
}

// ------------------------------------------------------------------ the op

OrtCustomOp make_op() {
  OrtCustomOp op = common_op();
  op.GetName = [](const OrtCustomOp*) -> const char* { return "Linear"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputs; };
  // Undefined: any. The weight's type is its format, and an input that is not there has none.
  op.GetInputType = [](const OrtCustomOp*, size_t index) {
    return index == kX ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index <= kWeight ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.CreateKernelV2 = &create_kernel;
  op.KernelComputeV2 = &compute;
  op.KernelDestroy = &destroy_kernel;
  op.InferOutputShapeFn = &infer_shapes;
  return op;
}

}  // namespace

OrtStatus* add_linear(OrtCustomOpDomain* domain) {
  static const OrtCustomOp linear = make_op();
  return api->CustomOpDomain_Add(domain, &linear);
}

}  // namespace ort
}  // namespace apar
