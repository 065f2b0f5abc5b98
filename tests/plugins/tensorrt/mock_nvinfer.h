// A plugin registry and dimension arithmetic made of TensorRT's public headers alone, for tests without its library.
#ifndef APAR_TESTS_MOCK_NVINFER_H_
#define APAR_TESTS_MOCK_NVINFER_H_

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace mock {

using namespace nvinfer1;

class Registry final : public IPluginRegistry {
 public:
#if NV_TENSORRT_MAJOR < 11
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t* const count) const noexcept override { *count = 0; return nullptr; }
  IPluginCreator* getPluginCreator(AsciiChar const* const, AsciiChar const* const, AsciiChar const* const) noexcept override { return nullptr; }
  bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#pragma GCC diagnostic pop
#endif
  void setErrorRecorder(IErrorRecorder* const) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool const) override {}
  PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* const) noexcept override {
    creators_.push_back(&creator);
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* const count) const noexcept override {
    *count = static_cast<int32_t>(creators_.size());
    return creators_.data();
  }
  IPluginCreatorInterface* getCreator(AsciiChar const* const name, AsciiChar const* const version,
                                      AsciiChar const* const space) noexcept override {
    for (IPluginCreatorInterface* creator : creators_) {
      auto* one = static_cast<IPluginCreatorV3One*>(creator);
      if (std::strcmp(one->getPluginName(), name) == 0 && std::strcmp(one->getPluginVersion(), version) == 0 &&
          std::strcmp(one->getPluginNamespace(), space) == 0)
        return creator;
    }
    return nullptr;
  }
  bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return true; }
  IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 10
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const count) noexcept override { return getAllCreators(count); }
#endif

 private:
  std::vector<IPluginCreatorInterface*> creators_;
};

// Dimensions are known numbers.
class Value final : public apiv::VDimensionExpr {
 public:
  explicit Value(int64_t value) : value_(value) {}
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t value_;
};

class Expr final : public IDimensionExpr {
 public:
  explicit Expr(int64_t value) : value_(value) { mImpl = &value_; }

 private:
  Value value_;
};

class Arithmetic final : public apiv::VExprBuilder {
 public:
  IDimensionExpr const* constant(int64_t value) override {
    kept_.push_back(std::make_unique<Expr>(value));
    return kept_.back().get();
  }
  IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& first, IDimensionExpr const& second) override {
    const int64_t a = first.getConstantValue(), b = second.getConstantValue();
    switch (op) {
      case DimensionOperation::kSUM: return constant(a + b);
      case DimensionOperation::kPROD: return constant(a * b);
      case DimensionOperation::kMAX: return constant(std::max(a, b));
      case DimensionOperation::kMIN: return constant(std::min(a, b));
      case DimensionOperation::kSUB: return constant(a - b);
      case DimensionOperation::kFLOOR_DIV: return constant(a / b);
      case DimensionOperation::kCEIL_DIV: return constant((a + b - 1) / b);
      default: return nullptr;
    }
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override { return nullptr; }

 private:
  std::vector<std::unique_ptr<Expr>> kept_;
};

class Builder final : public IExprBuilder {
 public:
  Builder() { mImpl = &arithmetic_; }

 private:
  Arithmetic arithmetic_;
};

inline Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace mock

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept { return &mock::registry(); }
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() noexcept {
#ifdef MOCK_VERSION
  return MOCK_VERSION;
#else
  return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100;
#endif
}

#endif  // APAR_TESTS_MOCK_NVINFER_H_
