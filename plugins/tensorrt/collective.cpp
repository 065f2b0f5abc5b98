// AllReduce and AllGather over the ranks of a tensor-parallel engine, by NCCL, which is found at run time.
//
//   AllReduce  x -> the sum of x over all ranks
//   AllGather  x -> [ranks, *x]
//
// Written, not run: no machine with two GPUs was at hand.
#include <dlfcn.h>

#include <atomic>

#include "tensorrt/exports.h"
#include "tensorrt/plugin.h"

namespace apar {
namespace trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;

std::atomic<void*> communicator{nullptr};

struct Nccl {
  int (*all_reduce)(const void* from, void* to, size_t count, int type, int operation, void* communicator, void* stream);
  int (*all_gather)(const void* from, void* to, size_t count, int type, void* communicator, void* stream);
  const char* (*error_text)(int status);

  static const Nccl* get() {
    static const Nccl* const nccl = load();
    return nccl;
  }

 private:
  static const Nccl* load() {
    static Nccl nccl;
    void* library = dlopen("libnccl.so.2", RTLD_NOW);
    if (library == nullptr) return nullptr;
    nccl.all_reduce = reinterpret_cast<decltype(nccl.all_reduce)>(dlsym(library, "ncclAllReduce"));
    nccl.all_gather = reinterpret_cast<decltype(nccl.all_gather)>(dlsym(library, "ncclAllGather"));
    nccl.error_text = reinterpret_cast<decltype(nccl.error_text)>(dlsym(library, "ncclGetErrorString"));
    const bool whole = nccl.all_reduce != nullptr && nccl.all_gather != nullptr && nccl.error_text != nullptr;
    return whole ? &nccl : nullptr;
  }
};

// ncclDataType_t; -1 for what the graph never has.
int nccl_type(DataType type) {
  switch (type) {
    case DataType::kHALF:
      return 6;
    case DataType::kFLOAT:
      return 7;
    case DataType::kBF16:
      return 9;
    default:
      return -1;
  }
}
constexpr int kSum = 0;

struct AllReduceName {
  static constexpr const char* kName = "AllReduce";
  static constexpr bool kGathers = false;
};
struct AllGatherName {
  static constexpr const char* kName = "AllGather";
  static constexpr bool kGathers = true;
};

template <typename Name>
class Collective final : public Plugin {
 public:
  static constexpr const char* kName = Name::kName;

  static std::vector<nvinfer1::PluginField> fields() {
    return {{"ranks", nullptr, nvinfer1::PluginFieldType::kINT32, 1}};
  }
  static IPluginV3* make(Fields fields, TensorRTPhase phase, std::string* problem) {
    int32_t ranks = 0;
    fields.read("ranks", &ranks);
    *problem = fields.problem();
    if (problem->empty() && ranks < 2) *problem = "ranks is missing or less than 2";
    return problem->empty() ? new Collective(ranks, phase) : nullptr;
  }

  Collective(int32_t ranks, TensorRTPhase phase) : Plugin(kName, phase), ranks_(ranks) {}

  IPluginV3* clone() noexcept override { return new (std::nothrow) Collective(*this); }

  int32_t getOutputDataTypes(DataType* out, int32_t outputs, DataType const* in, int32_t inputs) const noexcept override {
    if (inputs != 1 || outputs != 1) return -1;
    out[0] = in[0];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out,
                          int32_t outputs, nvinfer1::IExprBuilder& builder) noexcept override {
    if (inputs != 1 || outputs != 1) return -1;
    out[0] = in[0];
    if (Name::kGathers) {
      if (in[0].nbDims >= Dims::MAX_DIMS) return -1;
      out[0].nbDims = in[0].nbDims + 1;
      out[0].d[0] = builder.constant(ranks_);
      for (int32_t i = 0; i < in[0].nbDims; ++i) out[0].d[i + 1] = in[0].d[i];
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != 1 || outputs != 1 || position < 0 || position > 1) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    return tensor.format == nvinfer1::TensorFormat::kLINEAR && nccl_type(tensor.type) >= 0 &&
           tensor.type == tensors[0].desc.type;
  }

 protected:
  std::string check_shapes(Dims const*, int32_t inputs) const override {
    return inputs == 1 ? std::string() : std::to_string(inputs) + " inputs, it takes 1";
  }

  std::string prepare() override {
    return Nccl::get() != nullptr ? std::string() : "libnccl.so.2 cannot be loaded; install NCCL to run several ranks";
  }

  std::string run(PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void*,
                  void* stream) override {
    const Nccl* nccl = Nccl::get();
    void* const ranks = communicator.load();
    if (nccl == nullptr || ranks == nullptr) return "the ranks were not connected (apar_tensorrt_set_communicator)";
    size_t count = 1;
    for (int32_t i = 0; i < in[0].dims.nbDims; ++i) count *= static_cast<size_t>(in[0].dims.d[i]);
    const int type = nccl_type(in[0].type);
    const int status = Name::kGathers ? nccl->all_gather(inputs[0], outputs[0], count, type, ranks, stream)
                                      : nccl->all_reduce(inputs[0], outputs[0], count, type, kSum, ranks, stream);
    return status == 0 ? std::string() : std::string("NCCL: ") + nccl->error_text(status);
  }

  void list_fields() override { add_field("ranks", &ranks_); }

 private:
  int32_t ranks_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* all_reduce_creator() {
  static auto* creator = new Creator<Collective<AllReduceName>>;
  return creator;
}

nvinfer1::IPluginCreatorInterface* all_gather_creator() {
  static auto* creator = new Creator<Collective<AllGatherName>>;
  return creator;
}

}  // namespace trt
}  // namespace apar

extern "C" void apar_tensorrt_set_communicator(void* nccl) { apar::trt::communicator.store(nccl); }
