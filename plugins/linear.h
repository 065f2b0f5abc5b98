/*
 * Linear: a projection of few tokens by a packed matrix, with what stands around it in a decoder.
 *
 * This header is the contract of the operator. A change of meaning raises APAR_LINEAR_ABI_VERSION, which each
 * node carries as the attribute `abi_version`.
 *
 * Node: domain `apar`, op_type `Linear`, since version 1.
 *
 *   T tokens, K input channels, N output channels, G groups of input channels of a row.
 *
 *   inputs   0 x         float32 [T, K], or [T, 2 K] where `gated`
 *            1 weight    the packed matrix: its element type and `bits` are its format
 *            2 scales    int8, int4: float32 [tiles, 16], one an output channel (then G = 1, and `group_size` is 0),
 *                        or bfloat16 [tiles, G, 16]
 *            3 zeros     uint8 [tiles, G, 16], optional: the code that stands for 0; otherwise 2^(bits - 1)
 *            4 bias      float32 [N], optional
 *            5 norm      float32 [K], optional: RMSNorm of x comes first
 *            6 residual  float32 [T, N], optional: is added
 *   outputs  0 y         float32 [T, N]
 *
 *   attributes  in_features (K), out_features (N), bits (of integer codes; 0 for floats), group_size, gated,
 *               abi_version   INT
 *               norm_epsilon  FLOAT
 *
 * Meaning: h = x; with `norm`, h = x / sqrt(mean(x^2) + norm_epsilon) * norm; with `gated`,
 * h = silu(x[:, :K]) * x[:, K:]. y = h W^T + bias + residual. `norm` and `gated` exclude each other.
 *
 * Layout: output channels come in tiles of 16, the last one filled up with zeros. Within a tile, input channels
 * follow each other, and of each the 16 output channels (K' is K rounded up):
 *   float32   float32  [tiles, K, 16]
 *   float16   float16  [tiles, K, 16]
 *   bfloat16  bfloat16 [tiles, K' / 2, 16, 2]   two neighbouring input channels together
 *   int8      uint8    [tiles, K' / 4, 16, 4]   four; K' a multiple of group_size, or of 32
 *                                               where there are no groups
 *   int4      uint8    [tiles, K' / 8, 16, 4]   eight, two in a byte, the even one in its low half; K' a
 *                                               multiple of group_size
 * value = (code - zero) * scale. Padding codes are never seen: their inputs are zeros.
 *
 * Arithmetic: sums are float32. For int8, inputs become 16-bit integers with a scale for each group of a token, or
 * for each 256 channels where there are no groups; for int4, 8-bit integers with a scale for each 32 channels (16
 * where group_size is 16). Integer products are summed exactly.
 *
 * Determinism: an output is the same bit for bit whatever other tokens there are and however many threads run. It
 * may differ between instruction sets. A NaN or infinity in a token's input makes that token's whole output NaN or
 * infinite, and no other's.
 */
#ifndef APAR_LINEAR_H_
#define APAR_LINEAR_H_

#include "fork_attention.h"

#define APAR_LINEAR_ABI_VERSION 1
#define APAR_LINEAR_TILE 16

#ifdef __cplusplus
extern "C" {
#endif

typedef enum AparLinearFormat {
  APAR_LINEAR_FLOAT32 = 0,
  APAR_LINEAR_FLOAT16 = 1,
  APAR_LINEAR_BFLOAT16 = 2,
  APAR_LINEAR_INT8 = 3,
  APAR_LINEAR_INT4 = 4
} AparLinearFormat;

/* Attributes of a node, and its weight's format. */
typedef struct AparLinearParams {
  int32_t abi_version;
  int32_t format; /* AparLinearFormat */
  int64_t in_features;
  int64_t out_features;
  int32_t group_size; /* int4: 16, 32, 64, 128 or 256; int8: one of these or 0; others: 0 */
  int32_t gated;
  float norm_epsilon;
} AparLinearParams;

/* Tensors of one call, dense and in C order. Optional ones may be null. `weight`, `scales` and `zeros` must have
 * the sizes that apar_linear_sizes gives. */
typedef struct AparLinearTensors {
  int64_t num_tokens;
  const float* x;
  const void* weight;
  const void* scales;
  const uint8_t* zeros;
  const float* bias;
  const float* norm;
  const float* residual;
  float* y;
} AparLinearTensors;

/* Elements of a node's packed tensors. */
typedef struct AparLinearSizes {
  int64_t weight; /* of the weight's element type: bytes for int8 and int4 */
  int64_t scales;
  int64_t zeros;
} AparLinearSizes;

typedef struct AparLinear AparLinear;

/* The APAR_LINEAR_ABI_VERSION this library implements. */
APAR_EXPORT int32_t apar_linear_abi_version(void);

/* Prepares an operator. Reads APAR_CPU_ISA. On failure *op is null and `message` (of `message_size` bytes) says
 * what is wrong. */
APAR_EXPORT AparStatus apar_linear_create(const AparLinearParams* params, AparLinear** op, char* message,
                                          size_t message_size);

APAR_EXPORT AparLinearSizes apar_linear_sizes(const AparLinear* op);

/* Computes y. `parallel_for` may be null: then the calling thread does everything. One operator may run on several
 * threads at once. */
APAR_EXPORT AparStatus apar_linear_run(const AparLinear* op, const AparLinearTensors* tensors,
                                       AparParallelFor parallel_for, void* parallel_context, char* message,
                                       size_t message_size);

APAR_EXPORT void apar_linear_destroy(AparLinear* op);

#ifdef __cplusplus
}
#endif

#endif /* APAR_LINEAR_H_ */
