// What the plugin library offers beside its plugins. Python reads it by ctypes (plugins/tensorrt_library.py).
#ifndef APAR_TENSORRT_EXPORTS_H_
#define APAR_TENSORRT_EXPORTS_H_

#include "fork_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Major version of the TensorRT whose headers the library was built with. */
APAR_EXPORT int32_t apar_tensorrt_major(void);

/* APAR_ABI_VERSION of the library. */
APAR_EXPORT int32_t apar_tensorrt_abi_version(void);

/* One line: whether the plugins are registered with the TensorRT of this process, or why not. */
APAR_EXPORT const char* apar_tensorrt_status(void);


/* Adds a table of GPU kernels. Null, or a sentence that is valid until the thread's next call. */
APAR_EXPORT const char* apar_tensorrt_add_kernels(const char* path);

/* Null if there are kernels for this compute capability (10 * major + minor), or a sentence, as above. */
APAR_EXPORT const char* apar_tensorrt_kernels(int32_t compute_capability);

/* Pools of the engine `engine_id`, one address a layer, for engines with kv_binding = bound. Not 0: it has some. */
APAR_EXPORT int32_t apar_tensorrt_bind_pools(int32_t engine_id, int32_t layers, void* const* pools,
                                             int64_t num_blocks);
APAR_EXPORT void apar_tensorrt_unbind_pools(int32_t engine_id);

/* Layers run since the library was loaded, and those whose pool came at two addresses and was copied. */
APAR_EXPORT void apar_tensorrt_counters(int64_t* run, int64_t* copied);

/* The ncclComm_t of the ranks, for engines of several ranks. */
APAR_EXPORT void apar_tensorrt_set_communicator(void* nccl);

#ifdef __cplusplus
}
#endif

#endif /* APAR_TENSORRT_EXPORTS_H_ */
