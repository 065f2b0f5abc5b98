// What the genuine Python bindings ask of libnvinfer, libnvonnxparser and libnvinfer_plugin when they are imported:
// a registry that works, and factories that make nothing.
#include "mock_nvinfer.h"

#define MOCK extern "C" __attribute__((visibility("default")))

MOCK void* createInferBuilder_INTERNAL(void*, int) { return nullptr; }
MOCK void* createInferRefitter_INTERNAL(void*, void*, int) { return nullptr; }
MOCK void* createInferRuntime_INTERNAL(void*, int) { return nullptr; }
MOCK nvinfer1::IPluginRegistry* getBuilderPluginRegistry(int) { return &mock::registry(); }
MOCK void* createNvOnnxParser_INTERNAL(void*, void*, int) { return nullptr; }
MOCK void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int) { return nullptr; }
MOCK int getNvOnnxParserVersion() { return 0; }
MOCK bool initLibNvInferPlugins(void*, char const*) { return true; }
