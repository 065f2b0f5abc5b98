/*
 * ForkAttention: ragged paged attention for branches that share the blocks of their common path.
 *
 * This header is the contract of the operator. Every implementation (the CPU kernels here, the GPU
 * kernels, the TensorRT plugin) and every producer of graphs follows it; a change of meaning raises
 * APAR_ABI_VERSION, which each node carries as the attribute `abi_version`.
 *
 * Node: domain `apar`, op_type `ForkAttention`, since version 1.
 *
 *   T tokens, R rows, B blocks, MB width of the block table, C slot copies, G groups, W mask words,
 *   H query heads, K key/value heads, D head dimension, BS block size. Index tensors are int32.
 *
 *   inputs   0 qkv            float32 [T, (H + 2 K) D]      before RoPE; all q heads, all k heads, all v heads
 *            1 past_kv        float32 or float16 [2, B, K, BS, D]   the pool; [0] keys, [1] values
 *            2 position_ids   [T]       path position of each token, the angle of RoPE
 *            3 query_start    [R + 1]   row r owns tokens query_start[r] .. query_start[r + 1] - 1
 *            4 kv_len         [R]       keys of the row, this step's tokens included
 *            5 block_table    [R, MB]   blocks of the row's path; entries past the last needed one are not read
 *            6 slot_mapping   [T]       slot (block * BS + offset) of each token's K and V; -1: padding
 *            7 slot_copies    [C, 2]    source slot, target slot
 *            8 prefix_rows    [G + 1]   group g = rows prefix_rows[g] .. prefix_rows[g + 1] - 1; G may be 0
 *            9 prefix_blocks  [G]       leading blocks that all rows of the group have in common
 *           10 tree_mask      [T, W]    bit j % 32 of word j / 32: the row's j-th step token is visible
 *   outputs  0 attn           float32 [T, H D]
 *            1 present_kv     type and shape of past_kv. Meant to be the same memory: then the pool is
 *                             updated in place. Where it is not, the pool is copied first.
 *
 *   attributes  num_heads, num_kv_heads, head_dim, block_size, abi_version   INT
 *               scale         FLOAT   factor on q.k
 *               rope_inv_freq FLOATS  D / 2 inverse frequencies; angle = position * inv_freq in float32
 *               rope_scale    FLOAT   factor on cos and sin
 *               plugin_version, plugin_namespace   STRING, for TensorRT's parser, ignored elsewhere
 *
 * Meaning, in this order:
 *   1. Every slot copy, as if all sources were read before any target is written.
 *   2. RoPE on q and k, Hugging Face's rotate-half convention: element i is paired with i + D / 2.
 *   3. K and V of every token whose slot is not -1 go to the pool, rounded to its type. All of
 *      these writes come before any read of step 4.
 *   4. Token i of a row with n tokens has key index kv_len - n + i. It sees all key indices below
 *      kv_len - n and, of the row's own step tokens, those j <= i (W = 0) or those whose bit is set
 *      (W > 0; bits from n on are ignored). Key k lies in slot block_table[r][k / BS] * BS + k % BS.
 *      attn = softmax(scale * q.k) v; query head h reads key/value head h / (H / K). A token that sees
 *      no key at all gets zeros.
 *
 * Padding: a token with slot -1 writes nothing and its output row is zeros, whatever its qkv holds.
 * A row without any token of slot >= 0 is padding: its kv_len and block_table are not read.
 *
 * Layout: where element (slot, dimension) lies inside the [BS, D] panel of one (key/value, block, head)
 * is the implementation's own business, so a pool written by one must not be read by another. Panels are
 * contiguous; zero bytes are a valid pool. Elements of slots that no path holds are never used.
 *
 * Determinism: the sums of a (token, head) are ordered by its own key indices only. The result is
 * bit for bit the same whatever other rows the step holds, however prefill is cut into chunks,
 * whether prefixes are declared as shared, and however many threads run. It may differ between
 * instruction sets.
 *
 * Errors: everything is checked before anything is written. prefix_blocks is checked against the
 * tables of its rows; two writers of one slot (in slot_mapping, or among the targets of slot_copies)
 * are an error.
 */
#ifndef APAR_FORK_ATTENTION_H_
#define APAR_FORK_ATTENTION_H_

#include <stddef.h>
#include <stdint.h>

#define APAR_ABI_VERSION 1

#if defined(_WIN32)
#define APAR_EXPORT __declspec(dllexport)
#else
#define APAR_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum AparStatus {
  APAR_OK = 0,
  APAR_INVALID_ARGUMENT = 1, /* a parameter, shape, type or index is out of bounds */
  APAR_ABI_MISMATCH = 2,     /* the engine was built for another APAR_ABI_VERSION */
  APAR_UNSUPPORTED = 3,      /* the requested instruction set is not available */
  APAR_OUT_OF_MEMORY = 4
} AparStatus;

typedef enum AparType { APAR_FLOAT32 = 0, APAR_FLOAT16 = 1 } AparType;

/* Attributes of a node. */
typedef struct AparForkAttentionParams {
  int32_t abi_version;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;   /* even */
  int32_t block_size; /* >= 1 */
  float scale;
  float rope_scale;
  int32_t rope_inv_freq_count; /* head_dim / 2 */
  const float* rope_inv_freq;
} AparForkAttentionParams;

/* Tensors of one call, all in host memory, dense and in C order. A pointer may be null where its
 * tensor has no elements. */
typedef struct AparForkAttentionTensors {
  int64_t num_tokens;    /* T */
  int64_t num_rows;      /* R */
  int64_t num_blocks;    /* B */
  int64_t table_width;   /* MB */
  int64_t num_copies;    /* C */
  int64_t num_groups;    /* G */
  int64_t mask_words;    /* W */
  int32_t kv_type;       /* AparType of past_kv and present_kv */
  int32_t reserved;      /* 0 */
  const float* qkv;
  const void* past_kv;
  const int32_t* position_ids;
  const int32_t* query_start;
  const int32_t* kv_len;
  const int32_t* block_table;
  const int32_t* slot_mapping;
  const int32_t* slot_copies;
  const int32_t* prefix_rows;
  const int32_t* prefix_blocks;
  const int32_t* tree_mask;
  float* attn;
  void* present_kv;
} AparForkAttentionTensors;

/* Runs body(data, i) for i in 0 .. total - 1, in any order and on any threads, and returns when all
 * are done. */
typedef void (*AparParallelFor)(void* context, void (*body)(void* data, size_t i), size_t total,
                                void* data);

typedef struct AparForkAttention AparForkAttention;

/* The APAR_ABI_VERSION this library implements. */
APAR_EXPORT int32_t apar_abi_version(void);

/* Name of the instruction set that kernels are taken from: "generic", "avx2", "avx512" or
 * "avx512_vnni". The best one of the machine, or what the environment variable APAR_CPU_ISA says; null if that is no name
 * of an instruction set that this machine has. */
APAR_EXPORT const char* apar_cpu_isa(void);

/* Prepares an operator. Reads APAR_CPU_ISA. On failure *op is null and `message` (of `message_size`
 * bytes) says what is wrong. */
APAR_EXPORT AparStatus apar_fork_attention_create(const AparForkAttentionParams* params,
                                                  AparForkAttention** op, char* message,
                                                  size_t message_size);

/* Runs one step. `parallel_for` may be null: then the calling thread does everything. One operator may
 * run on several threads at once, on different pools. On failure nothing has been written. */
APAR_EXPORT AparStatus apar_fork_attention_run(const AparForkAttention* op,
                                               const AparForkAttentionTensors* tensors,
                                               AparParallelFor parallel_for, void* parallel_context,
                                               char* message, size_t message_size);

APAR_EXPORT void apar_fork_attention_destroy(AparForkAttention* op);

#ifdef __cplusplus
}
#endif

#endif /* APAR_FORK_ATTENTION_H_ */
