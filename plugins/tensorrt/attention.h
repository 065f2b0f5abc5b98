// What the plan and the attention layers share: shapes and attributes, and the kernels of a layer.
#ifndef APAR_TENSORRT_ATTENTION_H_
#define APAR_TENSORRT_ATTENTION_H_

#include <cstdint>
#include <string>

#include "gpu/launch_table.h"
#include "tensorrt/kernels.h"
#include "tensorrt/plugin.h"

namespace apar {
namespace trt {

struct HeadShape {
  int32_t abi_version = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_size = 0;

  void read(Fields* fields);
  // "" or which attribute is missing or impossible, and a refusal of another ABI.
  std::string check() const;
  static void list(std::vector<nvinfer1::PluginField>* fields);
};

// A plugin that knows the heads and launches kernels.
class HeadPlugin : public Plugin {
 public:
  HeadPlugin(const char* name, const HeadShape& heads, nvinfer1::TensorRTPhase phase)
      : Plugin(name, phase), heads_(heads) {}

 protected:
  // Fields of HeadShape, in their order.
  void list_fields() override;
  // "" or why there is no CUDA driver.
  std::string find_driver();
  Choice choice(uint32_t dtype) const {
    return {dtype, static_cast<uint32_t>(heads_.head_dim), static_cast<uint32_t>(heads_.block_size)};
  }

  HeadShape heads_;
  const Driver* driver_ = nullptr;
};

// The kernels of an attention layer for one element type.
class LayerKernels {
 public:
  // "" or which one is missing; then there are none.
  std::string load(const Driver& driver, const HeadShape& heads, const Choice& choice);
  bool loaded() const { return merge_.function != nullptr; }
  // Puts a layer on the stream, copies first where there are some. "" or what failed.
  std::string launch(const Driver& driver, const HeadShape& heads, const AparGpuSizes& sizes, int64_t tokens,
                     int64_t copies, Arguments* arguments, void* stream) const;

 private:
  Kernel copy_read_, copy_write_, rope_, attend_small_, attend_large_, merge_;
};

// Bounds over all steps of at most these sizes. Both tiles are thought of: a smaller step may choose the other one.
AparGpuSizes largest_sizes(int64_t tokens, int64_t rows, int64_t groups, const HeadShape& heads);

// "[2, 3]".
std::string text(const nvinfer1::Dims& dims);

// Pools that are bound by engine, not by the network (kv_binding = bound).
struct BoundPool {
  void* address = nullptr;
  int64_t num_blocks = 0;
};
bool bind_pools(int32_t engine_id, int32_t layers, void* const* pools, int64_t num_blocks);
void unbind_pools(int32_t engine_id);
BoundPool bound_pool(int32_t engine_id, int32_t layer);

// Layers run, and layers whose pool came at two addresses and was copied.
void count_layer(bool copied);
void read_counters(int64_t* run, int64_t* copied);

}  // namespace trt
}  // namespace apar

#endif  // APAR_TENSORRT_ATTENTION_H_
