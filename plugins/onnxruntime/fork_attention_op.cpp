// ForkAttention as an ONNX Runtime custom op: types, shapes, attributes. What the operator does is in
// fork_attention.h and cpu/.
#include "fork_attention.h"

#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "onnxruntime/ort_api.h"

namespace apar {
namespace ort {
namespace {

enum Input : size_t {
  kQkv,
  kPastKv,
  kPositionIds,
  kQueryStart,
  kKvLen,
  kBlockTable,
  kSlotMapping,
  kSlotCopies,
  kPrefixRows,
  kPrefixBlocks,
  kTreeMask,
  kInputs
};
enum Output : size_t { kAttn, kPresentKv, kOutputs };

struct InputInfo {
  const char* name;
  size_t rank;
};
constexpr InputInfo kInput[kInputs] = {
    {"qkv", 2},           // [T, (H + 2 K) D]
    {"past_kv", 5},       // [2, B, K, BS, D]
    {"position_ids", 1},  // [T]
    {"query_start", 1},   // [R + 1]
    {"kv_len", 1},        // [R]
    {"block_table", 2},   // [R, MB]
    {"slot_mapping", 1},  // [T]
    {"slot_copies", 2},   // [C, 2]
    {"prefix_rows", 1},   // [G + 1]
    {"prefix_blocks", 1},  // [G]
    {"tree_mask", 2},     // [T, W]
};

// ------------------------------------------------------------------ kernel

struct Kernel {
  AparForkAttentionParams params;
  std::vector<float> rope_inv_freq;
  AparForkAttention* op;
};

OrtStatus* read_params(const OrtKernelInfo* info, Kernel* kernel) {
  AparForkAttentionParams& p = kernel->params;
  // The version first: where it differs, the other attributes may mean something else.
  APAR_ORT_TRY(read_int(info, "ForkAttention", "abi_version", &p.abi_version));
  if (p.abi_version != APAR_ABI_VERSION) return nullptr;
  APAR_ORT_TRY(read_int(info, "ForkAttention", "num_heads", &p.num_heads));
  APAR_ORT_TRY(read_int(info, "ForkAttention", "num_kv_heads", &p.num_kv_heads));
  APAR_ORT_TRY(read_int(info, "ForkAttention", "head_dim", &p.head_dim));
  APAR_ORT_TRY(read_int(info, "ForkAttention", "block_size", &p.block_size));
  APAR_ORT_TRY(api->KernelInfoGetAttribute_float(info, "scale", &p.scale));
  APAR_ORT_TRY(api->KernelInfoGetAttribute_float(info, "rope_scale", &p.rope_scale));
  size_t count = 0;
  APAR_ORT_TRY(api->KernelInfoGetAttributeArray_float(info, "rope_inv_freq", nullptr, &count));
  kernel->rope_inv_freq.resize(count);
  APAR_ORT_TRY(api->KernelInfoGetAttributeArray_float(info, "rope_inv_freq", kernel->rope_inv_freq.data(), &count));
  p.rope_inv_freq = kernel->rope_inv_freq.data();
  p.rope_inv_freq_count = static_cast<int32_t>(count);
  return nullptr;
}

OrtStatus* ORT_API_CALL create_kernel(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** to) {
  *to = nullptr;
  try {
    auto kernel = std::make_unique<Kernel>();
    APAR_ORT_TRY(read_params(info, kernel.get()));
    char message[kMessageSize];
    const AparStatus status = apar_fork_attention_create(&kernel->params, &kernel->op, message, sizeof message);
    if (status != APAR_OK) return failed(status, message);
    *to = kernel.release();
    return nullptr;
  } catch (const std::exception& problem) {
    return api->CreateStatus(ORT_FAIL, problem.what());
  }
}

void ORT_API_CALL destroy_kernel(void* kernel) {
  if (kernel == nullptr) return;
  apar_fork_attention_destroy(static_cast<Kernel*>(kernel)->op);
  delete static_cast<Kernel*>(kernel);
}

// ------------------------------------------------------------------ one call

struct Tensor {
  const void* data;
  std::array<int64_t, 5> dims;
  ONNXTensorElementDataType type;
};

OrtStatus* read_input(OrtKernelContext* context, size_t index, Tensor* tensor) {
  const OrtValue* value = nullptr;
  APAR_ORT_TRY(api->KernelContext_GetInput(context, index, &value));
  if (value == nullptr)
    return error((std::string("ForkAttention: input ") + kInput[index].name + " is missing").c_str());
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  APAR_ORT_TRY(api->GetTensorTypeAndShape(value, &raw));
  const ShapeInfo info(raw);
  size_t rank = 0;
  APAR_ORT_TRY(api->GetDimensionsCount(raw, &rank));
  if (rank != kInput[index].rank)
    return error((std::string("ForkAttention: ") + kInput[index].name + " has " + std::to_string(rank) +
                  " dimensions, it needs " + std::to_string(kInput[index].rank))
                     .c_str());
  APAR_ORT_TRY(api->GetDimensions(raw, tensor->dims.data(), rank));
  APAR_ORT_TRY(api->GetTensorElementType(raw, &tensor->type));
  void* data = nullptr;
  APAR_ORT_TRY(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor->data = data;
  return nullptr;
}

OrtStatus* check_shape(const Tensor* inputs, size_t index, const std::array<int64_t, 5>& want, const char* formula) {
  const size_t rank = kInput[index].rank;
  for (size_t i = 0; i < rank; ++i)
    if (inputs[index].dims[i] != want[i])
      return error((std::string("ForkAttention: ") + kInput[index].name + " has shape " +
                    shape_text(inputs[index].dims.data(), rank) + ", it must be " + formula + " = " +
                    shape_text(want.data(), rank))
                       .c_str());
  return nullptr;
}

OrtStatus* describe(const Kernel& kernel, const Tensor* in, AparForkAttentionTensors* t) {
  const AparForkAttentionParams& p = kernel.params;
  t->num_tokens = in[kQkv].dims[0];
  t->num_rows = in[kKvLen].dims[0];
  t->num_blocks = in[kPastKv].dims[1];
  t->table_width = in[kBlockTable].dims[1];
  t->num_copies = in[kSlotCopies].dims[0];
  t->num_groups = in[kPrefixBlocks].dims[0];
  t->mask_words = in[kTreeMask].dims[1];
  const int64_t width = (int64_t{p.num_heads} + 2 * int64_t{p.num_kv_heads}) * p.head_dim;
  APAR_ORT_TRY(check_shape(in, kQkv, {t->num_tokens, width}, "[T, (num_heads + 2 num_kv_heads) head_dim]"));
  APAR_ORT_TRY(check_shape(in, kPastKv, {2, t->num_blocks, p.num_kv_heads, p.block_size, p.head_dim},
                           "[2, B, num_kv_heads, block_size, head_dim]"));
  APAR_ORT_TRY(check_shape(in, kPositionIds, {t->num_tokens}, "[T]"));
  APAR_ORT_TRY(check_shape(in, kQueryStart, {t->num_rows + 1}, "[R + 1]"));
  APAR_ORT_TRY(check_shape(in, kBlockTable, {t->num_rows, t->table_width}, "[R, MB]"));
  APAR_ORT_TRY(check_shape(in, kSlotMapping, {t->num_tokens}, "[T]"));
  APAR_ORT_TRY(check_shape(in, kSlotCopies, {t->num_copies, 2}, "[C, 2]"));
  APAR_ORT_TRY(check_shape(in, kPrefixRows, {t->num_groups + 1}, "[G + 1]"));
  APAR_ORT_TRY(check_shape(in, kTreeMask, {t->num_tokens, t->mask_words}, "[T, W]"));
  t->kv_type = in[kPastKv].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? APAR_FLOAT16 : APAR_FLOAT32;
  t->qkv = static_cast<const float*>(in[kQkv].data);
  t->past_kv = in[kPastKv].data;
  t->position_ids = static_cast<const int32_t*>(in[kPositionIds].data);
  t->query_start = static_cast<const int32_t*>(in[kQueryStart].data);
  t->kv_len = static_cast<const int32_t*>(in[kKvLen].data);
  t->block_table = static_cast<const int32_t*>(in[kBlockTable].data);
  t->slot_mapping = static_cast<const int32_t*>(in[kSlotMapping].data);
  t->slot_copies = static_cast<const int32_t*>(in[kSlotCopies].data);
  t->prefix_rows = static_cast<const int32_t*>(in[kPrefixRows].data);
  t->prefix_blocks = static_cast<const int32_t*>(in[kPrefixBlocks].data);
  t->tree_mask = static_cast<const int32_t*>(in[kTreeMask].data);
  return nullptr;
}

OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank, void** data) {
  OrtValue* value = nullptr;
  APAR_ORT_TRY(api->KernelContext_GetOutput(context, index, dims, rank, &value));
  return api->GetTensorMutableData(value, data);
}

OrtStatus* ORT_API_CALL compute(void* self, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  try {
    Tensor inputs[kInputs];
    for (size_t i = 0; i < kInputs; ++i) APAR_ORT_TRY(read_input(context, i, &inputs[i]));
    AparForkAttentionTensors tensors = {};
    APAR_ORT_TRY(describe(kernel, inputs, &tensors));
    const std::array<int64_t, 2> attn = {tensors.num_tokens, int64_t{kernel.params.num_heads} * kernel.params.head_dim};
    void* data = nullptr;
    APAR_ORT_TRY(output(context, kAttn, attn.data(), attn.size(), &data));
    tensors.attn = static_cast<float*>(data);
    APAR_ORT_TRY(output(context, kPresentKv, inputs[kPastKv].dims.data(), 5, &tensors.present_kv));
    char message[kMessageSize];
    const AparStatus status =
        apar_fork_attention_run(kernel.op, &tensors, &parallel_for, context, message, sizeof message);
    return status == APAR_OK ? nullptr : failed(status, message);
  } catch (const std::exception& problem) {
    return api->CreateStatus(ORT_FAIL, problem.what());
  }
}

// ------------------------------------------------------------------ shapes

OrtStatus* input_shape(OrtShapeInferContext* context, size_t index, OrtTensorTypeAndShapeInfo** info,
                       std::vector<int64_t>* dims, std::vector<const char*>* names) {
  APAR_ORT_TRY(api->ShapeInferContext_GetInputTypeShape(context, index, info));
  size_t rank = 0;
  APAR_ORT_TRY(api->GetDimensionsCount(*info, &rank));
  dims->resize(rank);
  names->resize(rank);
  APAR_ORT_TRY(api->GetDimensions(*info, dims->data(), rank));
  return api->GetSymbolicDimensions(*info, names->data(), rank);
}

OrtStatus* ORT_API_CALL infer_shapes(const OrtCustomOp*, OrtShapeInferContext* context) {
  try {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    std::vector<int64_t> qkv, pool;
    std::vector<const char*> qkv_names, pool_names;
    // These infos belong to the context.
    APAR_ORT_TRY(input_shape(context, kQkv, &info, &qkv, &qkv_names));
    APAR_ORT_TRY(input_shape(context, kPastKv, &info, &pool, &pool_names));
    int64_t heads = 0, head_dim = 0;
    APAR_ORT_TRY(attribute(context, "num_heads", &heads));
    APAR_ORT_TRY(attribute(context, "head_dim", &head_dim));
    if (qkv.size() == kInput[kQkv].rank)
      APAR_ORT_TRY(set_shape(context, kAttn, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {qkv[0], heads * head_dim},
                             {qkv_names[0], ""}));
    // The runtime asks the first op of this name for all of them, so the type is the input's, not the op's.
    ONNXTensorElementDataType kv_type;
    APAR_ORT_TRY(api->GetTensorElementType(info, &kv_type));
    if (pool.size() == kInput[kPastKv].rank) APAR_ORT_TRY(set_shape(context, kPresentKv, kv_type, pool, pool_names));
    return nullptr;
  } catch (const std::exception& problem) {
    return api->CreateStatus(ORT_FAIL, problem.what());
  }
}

// ------------------------------------------------------------------ the op

template <ONNXTensorElementDataType kKvType>
OrtCustomOp make_op() {
  OrtCustomOp op = common_op();
  op.GetName = [](const OrtCustomOp*) -> const char* { return "ForkAttention"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputs; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) {
    return index == kQkv ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                         : (index == kPastKv ? kKvType : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return kOutputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t index) {
    return index == kAttn ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : kKvType;
  };
  op.CreateKernelV2 = &create_kernel;
  op.KernelComputeV2 = &compute;
  op.KernelDestroy = &destroy_kernel;
  op.InferOutputShapeFn = &infer_shapes;
  return op;
}

}  // namespace

OrtStatus* add_fork_attention(OrtCustomOpDomain* domain) {
  static const OrtCustomOp float32 = make_op<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>();
  static const OrtCustomOp float16 = make_op<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>();
  APAR_ORT_TRY(api->CustomOpDomain_Add(domain, &float32));
  return api->CustomOpDomain_Add(domain, &float16);
}

}  // namespace ort
}  // namespace apar
