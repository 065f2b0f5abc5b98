/* What TensorRT's Python bindings need to be imported where its libraries are not: symbols that make nothing. */
#include <stddef.h>

#define STUB __attribute__((visibility("default")))

STUB void* createInferBuilder_INTERNAL(void* logger, int version) { (void)logger, (void)version; return NULL; }
STUB void* createInferRefitter_INTERNAL(void* engine, void* logger, int version) { (void)engine, (void)logger, (void)version; return NULL; }
STUB void* createInferRuntime_INTERNAL(void* logger, int version) { (void)logger, (void)version; return NULL; }
STUB void* getPluginRegistry(void) { return NULL; }
STUB void* getBuilderPluginRegistry(int capability) { (void)capability; return NULL; }
STUB int getInferLibVersion(void) { return 0; }
STUB void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) { (void)network, (void)logger, (void)version; return NULL; }
STUB void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) { (void)refitter, (void)logger, (void)version; return NULL; }
STUB int getNvOnnxParserVersion(void) { return 0; }
STUB int initLibNvInferPlugins(void* logger, char const* name) { (void)logger, (void)name; return 1; }
