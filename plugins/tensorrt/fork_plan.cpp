// ForkPlan: which program of the attention kernel reads which keys, worked out on the device once a step.
//
//   inputs   query_start [R + 1], kv_len [R], slot_mapping [T], prefix_rows [G + 1], prefix_blocks [G], tree_mask [M, W]
//   output   plan int32: room for the plan of any step of these shapes
//
// M < T says that the step has no mask, as TensorRT has no comfortable empty tensors.
#include "tensorrt/attention.h"

namespace apar {
namespace trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;

enum Input { kQueryStart, kKvLen, kSlotMapping, kPrefixRows, kPrefixBlocks, kTreeMask, kInputs };
constexpr int32_t kRank[kInputs] = {1, 1, 1, 1, 1, 2};

class ForkPlan final : public HeadPlugin {
 public:
  static constexpr const char* kName = "ForkPlan";

  static std::vector<nvinfer1::PluginField> fields() {
    std::vector<nvinfer1::PluginField> list;
    HeadShape::list(&list);
    return list;
  }
  static IPluginV3* make(Fields fields, TensorRTPhase phase, std::string* problem) {
    HeadShape heads;
    heads.read(&fields);
    *problem = fields.problem().empty() ? heads.check() : fields.problem();
    return problem->empty() ? new ForkPlan(heads, phase) : nullptr;
  }

  ForkPlan(const HeadShape& heads, TensorRTPhase phase) : HeadPlugin(kName, heads, phase) {}

  IPluginV3* clone() noexcept override { return new (std::nothrow) ForkPlan(*this); }

  int32_t getOutputDataTypes(DataType* out, int32_t outputs, DataType const*, int32_t inputs) const noexcept override {
    if (outputs != 1 || inputs != kInputs) return -1;
    out[0] = DataType::kINT32;
    return 0;
  }

  // largest_sizes().plan_size, in TensorRT's words.
  int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out,
                          int32_t outputs, nvinfer1::IExprBuilder& b) noexcept override {
    if (inputs != kInputs || outputs != 1) return -1;
    const AparGpuSizes fixed = largest_sizes(0, 0, 1, heads_);
    const int32_t per_group = heads_.num_heads / heads_.num_kv_heads;
    const int32_t tile = per_group <= APAR_GPU_SMALL_TILE ? APAR_GPU_SMALL_TILE : APAR_GPU_LARGE_TILE;
    const nvinfer1::IDimensionExpr *tokens = in[kSlotMapping].d[0], *rows = in[kKvLen].d[0],
                                   *groups = in[kPrefixBlocks].d[0];
    const auto sum = [&](const auto* x, const auto* y) { return b.operation(DimensionOperation::kSUM, *x, *y); };
    const auto scaled = [&](int64_t factor, const auto* x) {
      return b.operation(DimensionOperation::kPROD, *b.constant(factor), *x);
    };
    const auto* full = b.operation(DimensionOperation::kFLOOR_DIV, *tokens, *b.constant(tile / per_group));
    const auto* pairs = b.operation(DimensionOperation::kFLOOR_DIV, *rows, *b.constant(2));
    const auto* shared = b.operation(DimensionOperation::kMIN, *groups, *pairs);
    const auto* items = sum(sum(rows, scaled(2, full)), sum(shared, b.constant(fixed.budget)));
    out[0].nbDims = 1;
    out[0].d[0] = sum(sum(scaled(APAR_GPU_ITEM_FIELDS, items), scaled(APAR_GPU_PART_FIELDS, tokens)),
                      b.constant(APAR_GPU_PLAN_HEADER));
    return 0;
  }

  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return inputs == kInputs && outputs == 1 && position >= 0 && position <= kInputs &&
           tensors[position].desc.format == nvinfer1::TensorFormat::kLINEAR &&
           tensors[position].desc.type == DataType::kINT32;
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    const AparGpuSizes sizes =
        largest_sizes(in[kSlotMapping].max.d[0], in[kKvLen].max.d[0], in[kPrefixBlocks].max.d[0], heads_);
    return static_cast<size_t>(apar_gpu_aligned(4 * sizes.scratch_size));
  }

 protected:
  std::string check_shapes(Dims const* in, int32_t inputs) const override {
    if (inputs != kInputs) return std::to_string(inputs) + " inputs, it takes " + std::to_string(kInputs);
    for (int32_t i = 0; i < kInputs; ++i)
      if (in[i].nbDims != kRank[i]) return "input " + std::to_string(i) + " has shape " + text(in[i]);
    if (in[kQueryStart].d[0] != in[kKvLen].d[0] + 1) return "query_start must be one longer than kv_len";
    if (in[kPrefixRows].d[0] != in[kPrefixBlocks].d[0] + 1) return "prefix_rows must be one longer than prefix_blocks";
    return {};
  }

  std::string prepare() override {
    const std::string problem = find_driver();
    return problem.empty() ? load_kernel(*driver_, APAR_GPU_PLAN, choice(APAR_GPU_ANY), 0, &kernel_) : problem;
  }

  std::string run(PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace,
                  void* stream) override {
    const int64_t tokens = in[kSlotMapping].dims.d[0], rows = in[kKvLen].dims.d[0], groups = in[kPrefixBlocks].dims.d[0];
    if (tokens == 0) return {};
    if (kernel_.function == nullptr) return "it was not attached to a context";
    const AparGpuSizes sizes = apar_gpu_sizes(tokens, rows, groups, heads_.num_heads, heads_.num_kv_heads);
    Arguments arguments;
    arguments.set_sizes(sizes);
    arguments.set(APAR_GPU_QUERY_START, inputs[kQueryStart]);
    arguments.set(APAR_GPU_KV_LEN, inputs[kKvLen]);
    arguments.set(APAR_GPU_SLOT_MAPPING, inputs[kSlotMapping]);
    arguments.set(APAR_GPU_PREFIX_ROWS, inputs[kPrefixRows]);
    arguments.set(APAR_GPU_PREFIX_BLOCKS, inputs[kPrefixBlocks]);
    arguments.set(APAR_GPU_STEP_PLAN, outputs[0]);
    arguments.set(APAR_GPU_PLAN_SCRATCH, workspace);
    arguments.set(APAR_GPU_NUM_TOKENS, tokens);
    arguments.set(APAR_GPU_NUM_ROWS, rows);
    arguments.set(APAR_GPU_NUM_GROUPS, groups);
    arguments.set(APAR_GPU_MASKED, int64_t{in[kTreeMask].dims.d[0] == tokens});
    uint32_t grid[3];
    apar_gpu_grid(APAR_GPU_PLAN, &sizes, tokens, 0, heads_.num_heads, heads_.num_kv_heads, grid);
    return launch(*driver_, kernel_, grid, &arguments, stream);
  }

 private:
  Kernel kernel_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* plan_creator() {
  static auto* creator = new Creator<ForkPlan>;
  return creator;
}

}  // namespace trt
}  // namespace apar
