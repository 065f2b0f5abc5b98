// ForkAttention as a TensorRT plugin: RoPE, the K/V write and ragged paged attention, by the kernels of a launch table.
//
//   inputs   qkv [T, (H + 2 K) D], past_kv [2, B, K, BS, D], position_ids [T], query_start [R + 1], kv_len [R],
//            block_table [R, MB], slot_mapping [T], slot_copies [2 + C, 2], prefix_rows [G + 1], prefix_blocks [G],
//            tree_mask [M, W], plan (of ForkPlan), inv_freq float32 [D / 2]
//   outputs  attn [T, H D], present_kv
//
// fork_attention.h says what they mean. Differences, because TensorRT has no comfortable empty tensors: the first two
// rows of slot_copies are no copies (two, to keep the alignment), and M < T says that there is no mask. With
// kv_binding = bound there is neither past_kv nor present_kv: whoever runs the engine has given the pools' addresses
// by apar_tensorrt_bind_pools.
#include "tensorrt/attention.h"

namespace apar {
namespace trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;

enum Binding : int32_t { kInPlace = 0, kAliased = 1, kBound = 2 };

// Inputs in their order; where pools are bound, those behind kPastKv come one earlier.
enum Input : int32_t {
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
  kPlan,
  kInvFreq,
  kInputs
};
constexpr int32_t kRank[kInputs] = {2, 5, 1, 1, 1, 2, 1, 2, 1, 1, 2, 1, 1};
constexpr int64_t kNoCopies = 2;
constexpr int64_t kErrorBytes = 256;

struct Parameters {
  float scale = 0.0F;
  float rope_scale = 1.0F;
  std::vector<float> rope_inv_freq;
  int32_t kv_binding = kInPlace;
  int32_t engine_id = 0;
  int32_t layer = 0;
};

class ForkAttention final : public HeadPlugin {
 public:
  static constexpr const char* kName = "ForkAttention";

  static std::vector<nvinfer1::PluginField> fields() {
    using nvinfer1::PluginFieldType;
    std::vector<nvinfer1::PluginField> list;
    HeadShape::list(&list);
    list.emplace_back("scale", nullptr, PluginFieldType::kFLOAT32, 1);
    list.emplace_back("rope_scale", nullptr, PluginFieldType::kFLOAT32, 1);
    list.emplace_back("rope_inv_freq", nullptr, PluginFieldType::kFLOAT32, 0);
    for (const char* name : {"kv_binding", "engine_id", "layer"})
      list.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
    return list;
  }

  static IPluginV3* make(Fields fields, TensorRTPhase phase, std::string* problem) {
    HeadShape heads;
    Parameters p;
    heads.read(&fields);
    fields.read("scale", &p.scale);
    fields.read("rope_scale", &p.rope_scale);
    fields.read("rope_inv_freq", &p.rope_inv_freq);
    fields.read("kv_binding", &p.kv_binding);
    fields.read("engine_id", &p.engine_id);
    fields.read("layer", &p.layer);
    *problem = fields.problem().empty() ? heads.check() : fields.problem();
    if (problem->empty() && p.rope_inv_freq.size() != static_cast<size_t>(heads.head_dim / 2))
      *problem = "rope_inv_freq must have head_dim / 2 values";
    if (problem->empty() && !(p.scale > 0.0F)) *problem = "scale is missing or not positive";
    if (problem->empty() && (p.kv_binding < kInPlace || p.kv_binding > kBound))
      *problem = "kv_binding " + std::to_string(p.kv_binding) + " is unknown";
    return problem->empty() ? new ForkAttention(heads, std::move(p), phase) : nullptr;
  }

  ForkAttention(const HeadShape& heads, Parameters parameters, TensorRTPhase phase)
      : HeadPlugin(kName, heads, phase), p_(std::move(parameters)) {}

  IPluginV3* clone() noexcept override {
    try {
      return new ForkAttention(*this);
    } catch (const std::exception& error) {
      report(std::string("ForkAttention cannot be cloned: ") + error.what());
      return nullptr;
    }
  }

  int32_t getNbOutputs() const noexcept override { return bound() ? 1 : 2; }

  int32_t getOutputDataTypes(DataType* out, int32_t outputs, DataType const* in, int32_t inputs) const noexcept override {
    if (inputs != input_count() || outputs != getNbOutputs()) return -1;
    out[0] = in[kQkv];
    if (!bound()) out[1] = in[kPastKv];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out,
                          int32_t outputs, nvinfer1::IExprBuilder& builder) noexcept override {
    if (inputs != input_count() || outputs != getNbOutputs()) return -1;
    out[0].nbDims = 2;
    out[0].d[0] = in[kQkv].d[0];
    out[0].d[1] = builder.constant(int64_t{heads_.num_heads} * heads_.head_dim);
    if (!bound()) out[1] = in[kPastKv];
    return 0;
  }

  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != input_count() || outputs != getNbOutputs() || position < 0 || position >= inputs + outputs)
      return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == kQkv) return tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
    if (position >= inputs || (!bound() && position == kPastKv)) return tensor.type == tensors[kQkv].desc.type;
    if (position == at(kInvFreq)) return tensor.type == DataType::kFLOAT;
    return tensor.type == DataType::kINT32;
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    const int64_t tokens = in[kQkv].max.d[0], copies = in[at(kSlotCopies)].max.d[0];
    const AparGpuSizes sizes =
        largest_sizes(tokens, in[at(kKvLen)].max.d[0], in[at(kPrefixBlocks)].max.d[0], heads_);
    return static_cast<size_t>(workspace(sizes, tokens, copies).total + kErrorBytes);
  }

  int32_t getAliasedInput(int32_t output) noexcept override {
    return p_.kv_binding == kAliased && output == 1 ? kPastKv : -1;
  }

 protected:
  std::string check_shapes(Dims const* in, int32_t inputs) const override {
    if (inputs != input_count()) return std::to_string(inputs) + " inputs, it takes " + std::to_string(input_count());
    for (int32_t i = 0; i < kInputs; ++i)
      if (!(bound() && i == kPastKv) && in[at(i)].nbDims != kRank[i])
        return "input " + std::to_string(at(i)) + " has shape " + text(in[at(i)]);
    const HeadShape& h = heads_;
    const int64_t width = (int64_t{h.num_heads} + 2 * int64_t{h.num_kv_heads}) * h.head_dim;
    if (in[kQkv].d[1] != width) return "qkv has shape " + text(in[kQkv]) + ", its width must be " + std::to_string(width);
    if (!bound()) {
      const Dims& pool = in[kPastKv];
      if (pool.d[0] != 2 || pool.d[2] != h.num_kv_heads || pool.d[3] != h.block_size || pool.d[4] != h.head_dim)
        return "past_kv has shape " + text(pool) + ", it must be [2, B, " + std::to_string(h.num_kv_heads) + ", " +
               std::to_string(h.block_size) + ", " + std::to_string(h.head_dim) + "]";
    }
    if (in[at(kSlotCopies)].d[0] < kNoCopies || in[at(kSlotCopies)].d[1] != 2)
      return "slot_copies has shape " + text(in[at(kSlotCopies)]) + ", it must be [2 + C, 2]";
    if (in[at(kInvFreq)].d[0] != h.head_dim / 2) return "inv_freq must have head_dim / 2 values";
    return {};
  }

  std::string prepare() override {
    std::string problem = find_driver();
    if (!problem.empty()) return problem;
    // Both types, since only a step's tensors say which one the engine has.
    for (const uint32_t dtype : {APAR_GPU_FLOAT16, APAR_GPU_BFLOAT16}) {
      const std::string missing = kernels_[dtype - 1].load(*driver_, heads_, choice(dtype));
      if (!missing.empty()) problem = missing;
    }
    return kernels_[0].loaded() || kernels_[1].loaded() ? std::string() : problem;
  }

  std::string run(PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace_memory,
                  void* stream) override {
    const HeadShape& h = heads_;
    const int64_t tokens = in[kQkv].dims.d[0], rows = in[at(kKvLen)].dims.d[0];
    if (tokens == 0) return {};
    const LayerKernels& kernels = kernels_[in[kQkv].type == DataType::kHALF ? 0 : 1];
    if (!kernels.loaded()) return "there are no GPU kernels for the engine's element type";
    const int64_t groups = in[at(kPrefixBlocks)].dims.d[0], copies = in[at(kSlotCopies)].dims.d[0] - kNoCopies;
    const bool masked = in[at(kTreeMask)].dims.d[0] == tokens;

    BoundPool pool;
    if (bound()) {
      pool = bound_pool(p_.engine_id, p_.layer);
      if (pool.address == nullptr) return "no pool was bound for layer " + std::to_string(p_.layer);
    } else {
      pool = {outputs[1], in[kPastKv].dims.d[1]};
    }
    const bool moved = !bound() && inputs[kPastKv] != outputs[1];
    count_layer(moved);
    if (moved) {
      const int64_t bytes = 2 * 2 * pool.num_blocks * h.num_kv_heads * h.block_size * h.head_dim;
      const std::string problem = driver_->failure(
          "cuMemcpyDtoDAsync",
          driver_->memcpy_device_async(reinterpret_cast<uint64_t>(pool.address),
                                       reinterpret_cast<uint64_t>(inputs[kPastKv]), static_cast<size_t>(bytes), stream));
      if (!problem.empty()) return problem;
    }

    const AparGpuSizes sizes = apar_gpu_sizes(tokens, rows, groups, h.num_heads, h.num_kv_heads);
    const AparGpuWorkspace space = workspace(sizes, tokens, copies);
    char* const base = static_cast<char*>(workspace_memory);
    Arguments a;
    a.set_sizes(sizes);
    a.set(APAR_GPU_QKV, inputs[kQkv]);
    a.set(APAR_GPU_POOL, pool.address);
    a.set(APAR_GPU_OUT, outputs[0]);
    a.set(APAR_GPU_STEP_PLAN, inputs[at(kPlan)]);
    a.set(APAR_GPU_BLOCK_TABLE, inputs[at(kBlockTable)]);
    a.set(APAR_GPU_SLOT_MAPPING, inputs[at(kSlotMapping)]);
    a.set(APAR_GPU_TREE_MASK, inputs[at(kTreeMask)]);
    a.set(APAR_GPU_POSITION_IDS, inputs[at(kPositionIds)]);
    a.set(APAR_GPU_INV_FREQ, inputs[at(kInvFreq)]);
    a.set(APAR_GPU_SLOT_COPIES, static_cast<const int32_t*>(inputs[at(kSlotCopies)]) + 2 * kNoCopies);
    a.set(APAR_GPU_QUERY_START, inputs[at(kQueryStart)]);
    a.set(APAR_GPU_KV_LEN, inputs[at(kKvLen)]);
    a.set(APAR_GPU_PREFIX_ROWS, inputs[at(kPrefixRows)]);
    a.set(APAR_GPU_PREFIX_BLOCKS, inputs[at(kPrefixBlocks)]);
    a.set(APAR_GPU_Q, base + space.q);
    a.set(APAR_GPU_PART_OUT, base + space.part_out);
    a.set(APAR_GPU_PART_LSE, base + space.part_lse);
    a.set(APAR_GPU_PLAN_SCRATCH, base + space.plan_scratch);
    a.set(APAR_GPU_COPY_SCRATCH, base + space.copy_scratch);
    a.set(APAR_GPU_ERRORS, base + space.total);
    a.set(APAR_GPU_NUM_BLOCKS, pool.num_blocks);
    a.set(APAR_GPU_TABLE_WIDTH, in[at(kBlockTable)].dims.d[1]);
    a.set(APAR_GPU_MASK_WORDS, masked ? in[at(kTreeMask)].dims.d[1] : int64_t{0});
    a.set(APAR_GPU_NUM_HEADS, int64_t{h.num_heads});
    a.set(APAR_GPU_NUM_KV_HEADS, int64_t{h.num_kv_heads});
    a.set(APAR_GPU_NUM_COPIES, copies);
    a.set(APAR_GPU_NUM_TOKENS, tokens);
    a.set(APAR_GPU_NUM_ROWS, rows);
    a.set(APAR_GPU_NUM_GROUPS, groups);
    a.set(APAR_GPU_MASKED, int64_t{masked});
    a.set_float(APAR_GPU_SCALE, p_.scale);
    a.set_float(APAR_GPU_ROPE_SCALE, p_.rope_scale);

    return kernels.launch(*driver_, h, sizes, tokens, copies, &a, stream);
  }

  void list_fields() override {
    HeadPlugin::list_fields();
    add_field("scale", &p_.scale);
    add_field("rope_scale", &p_.rope_scale);
    add_field("rope_inv_freq", p_.rope_inv_freq.data(), p_.rope_inv_freq.size());
    add_field("kv_binding", &p_.kv_binding);
    add_field("engine_id", &p_.engine_id);
    add_field("layer", &p_.layer);
  }

 private:
  bool bound() const { return p_.kv_binding == kBound; }
  int32_t input_count() const { return bound() ? kInputs - 1 : kInputs; }
  int32_t at(int32_t input) const { return bound() && input > kPastKv ? input - 1 : input; }

  AparGpuWorkspace workspace(const AparGpuSizes& sizes, int64_t tokens, int64_t copies) const {
    return apar_gpu_workspace(&sizes, tokens, copies, heads_.num_heads, heads_.num_kv_heads, heads_.head_dim);
  }

  Parameters p_;
  LayerKernels kernels_[2];  // float16, bfloat16
};

}  // namespace

nvinfer1::IPluginCreatorInterface* attention_creator() {
  static auto* creator = new Creator<ForkAttention>;
  return creator;
}

}  // namespace trt
}  // namespace apar
