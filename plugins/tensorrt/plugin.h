// What the plugins share: the interfaces that every one of them has, fields in and out, and how problems are reported.
#ifndef APAR_TENSORRT_PLUGIN_H_
#define APAR_TENSORRT_PLUGIN_H_

#include <NvInferRuntime.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

namespace apar {
namespace trt {

constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "";

// Writes an error to TensorRT's log, or to standard error where there is none.
void report(const std::string& message) noexcept;

// Values that a creator got, by name. Fields that are not there keep the default; the type is checked.
class Fields {
 public:
  explicit Fields(nvinfer1::PluginFieldCollection const* fields) : fields_(fields) {}
  void read(const char* name, int32_t* value) { read(name, nvinfer1::PluginFieldType::kINT32, value, 1); }
  void read(const char* name, float* value) { read(name, nvinfer1::PluginFieldType::kFLOAT32, value, 1); }
  void read(const char* name, std::vector<float>* values);
  // What was wrong with them, "" for nothing.
  const std::string& problem() const { return problem_; }

 private:
  const nvinfer1::PluginField* find(const char* name, nvinfer1::PluginFieldType type);
  void read(const char* name, nvinfer1::PluginFieldType type, void* value, int32_t count);

  nvinfer1::PluginFieldCollection const* fields_;
  std::string problem_;
};

// A plugin: all interfaces in one object, as IPluginV3OneBuildV2 and IPluginV3OneRuntime ask for it.
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const char* name, nvinfer1::TensorRTPhase phase) : name_(name), phase_(phase) {}
  // The list of fields points into the object, so a copy makes its own.
  Plugin(const Plugin& other)
      : nvinfer1::IPluginV3(other),
        nvinfer1::IPluginV3OneCore(other),
        nvinfer1::IPluginV3OneBuildV2(other),
        nvinfer1::IPluginV3OneRuntime(other),
        name_(other.name_),
        phase_(other.phase_) {}
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;
  const char* getPluginName() const noexcept final { return name_; }
  const char* getPluginVersion() const noexcept final { return kVersion; }
  const char* getPluginNamespace() const noexcept final { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                          nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const*, int32_t, nvinfer1::DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    return 0;
  }
  // No alias, no timing cache: TensorRT must not skip or reorder what it knows nothing about.
  int32_t getAliasedInput(int32_t) noexcept override { return -1; }
  const char* getTimingCacheID() noexcept final { return nullptr; }

  int32_t setTactic(int32_t) noexcept final { return 0; }
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const* out,
                        int32_t outputs) noexcept final;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept final;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept final;

 protected:
  // Each returns "" or what is wrong, and may throw.
  virtual std::string check_shapes(nvinfer1::Dims const* in, int32_t inputs) const = 0;
  virtual std::string prepare() = 0;
  virtual std::string run(nvinfer1::PluginTensorDesc const* in, void const* const* inputs, void* const* outputs,
                          void* workspace, void* stream) = 0;
  virtual void list_fields() = 0;

  void add_field(const char* name, const int32_t* value) {
    fields_.emplace_back(name, value, nvinfer1::PluginFieldType::kINT32, 1);
  }
  void add_field(const char* name, const float* values, size_t count = 1) {
    fields_.emplace_back(name, values, nvinfer1::PluginFieldType::kFLOAT32, static_cast<int32_t>(count));
  }

 private:
  int32_t failed(const char* where, const std::string& why) const noexcept;

  const char* name_;
  nvinfer1::TensorRTPhase phase_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_ = {};
};

// Makes plugins of one class. `Kind` has kName, fields() and make(), which returns null with the reason in `problem`.
template <typename Kind>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() : fields_(Kind::fields()) {
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }
  nvinfer1::IPluginV3* createPlugin(const char*, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    try {
      std::string problem;
      nvinfer1::IPluginV3* plugin = Kind::make(Fields(fields), phase, &problem);
      if (plugin == nullptr) report(std::string(Kind::kName) + ": " + problem);
      return plugin;
    } catch (const std::exception& error) {
      report(std::string(Kind::kName) + " cannot be made: " + error.what());
      return nullptr;
    }
  }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Kind::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_ = {};
};

// The creators, made once.
nvinfer1::IPluginCreatorInterface* attention_creator();
nvinfer1::IPluginCreatorInterface* plan_creator();
nvinfer1::IPluginCreatorInterface* all_reduce_creator();
nvinfer1::IPluginCreatorInterface* all_gather_creator();

}  // namespace trt
}  // namespace apar

#endif  // APAR_TENSORRT_PLUGIN_H_
