#include "tensorrt/plugin.h"

namespace apar {
namespace trt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

const PluginField* Fields::find(const char* name, PluginFieldType type) {
  for (int32_t i = 0; fields_ != nullptr && i < fields_->nbFields; ++i) {
    const PluginField& field = fields_->fields[i];
    if (field.name == nullptr || std::strcmp(field.name, name) != 0) continue;
    if (field.type == type && (field.data != nullptr || field.length == 0)) return &field;
    problem_ = std::string("attribute ") + name + " has another type than it must";
  }
  return nullptr;
}

void Fields::read(const char* name, PluginFieldType type, void* value, int32_t count) {
  const PluginField* field = find(name, type);
  if (field == nullptr) return;
  if (field->length == count)
    std::memcpy(value, field->data, static_cast<size_t>(count) * 4);
  else
    problem_ = std::string("attribute ") + name + " has " + std::to_string(field->length) + " values";
}

void Fields::read(const char* name, std::vector<float>* values) {
  const PluginField* field = find(name, PluginFieldType::kFLOAT32);
  if (field == nullptr) return;
  values->resize(static_cast<size_t>(field->length));
  if (field->length > 0) std::memcpy(values->data(), field->data, values->size() * sizeof(float));
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

int32_t Plugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                                nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept {
  try {
    // The largest shapes of the profile, for they are the ones that are always known.
    std::vector<nvinfer1::Dims> dims;
    for (int32_t i = 0; i < inputs; ++i) dims.push_back(in[i].max);
    const std::string problem = check_shapes(dims.data(), inputs);
    return problem.empty() ? 0 : failed("the network does not fit", problem);
  } catch (const std::exception& error) {
    return failed("the network cannot be checked", error.what());
  }
}

int32_t Plugin::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const*,
                              int32_t) noexcept {
  try {
    std::vector<nvinfer1::Dims> dims;
    for (int32_t i = 0; i < inputs; ++i) dims.push_back(in[i].dims);
    const std::string problem = check_shapes(dims.data(), inputs);
    return problem.empty() ? 0 : failed("the step's shapes do not fit", problem);
  } catch (const std::exception& error) {
    return failed("the step's shapes cannot be checked", error.what());
  }
}

int32_t Plugin::enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*,
                        void const* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  // Autotuning runs plugins on tensors of any content: nothing may be read or written then.
  if (phase_ == TensorRTPhase::kBUILD) return 0;
  try {
    const std::string problem = run(in, inputs, outputs, workspace, stream);
    return problem.empty() ? 0 : failed("the step failed", problem);
  } catch (const std::exception& error) {
    return failed("the step failed", error.what());
  }
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  auto* plugin = static_cast<Plugin*>(clone());
  if (plugin == nullptr || phase_ == TensorRTPhase::kBUILD) return plugin;
  std::string problem;
  try {
    problem = plugin->prepare();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  if (problem.empty()) return plugin;
  failed("it cannot run here", problem);
  delete plugin;
  return nullptr;
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
  try {
    fields_.clear();
    list_fields();
  } catch (const std::exception& error) {
    failed("its attributes cannot be listed", error.what());
    return nullptr;
  }
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
  return &collection_;
}

int32_t Plugin::failed(const char* where, const std::string& why) const noexcept {
  try {
    report(std::string(name_) + ": " + where + ": " + why);
  } catch (const std::exception&) {
    report(where);
  }
  return -1;
}

}  // namespace trt
}  // namespace apar
