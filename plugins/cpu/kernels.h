// What the planning code and the kernels of each instruction set agree on.
//
// Layout of the CPU pool: the K panel of a (block, head) is stored transposed, [head_dim][block_size],
// so that one vector holds one dimension of neighbouring keys and a dot product needs no horizontal
// sum. The V panel is [block_size][head_dim].
//
// Kernel files are compiled for instruction sets the machine may lack. This header and
// kernels_simd.h therefore hold plain data and functions with internal linkage only: an inline function
// with external linkage would be merged across objects, and the AVX-512 copy could win everywhere.
#ifndef APAR_CPU_KERNELS_H_
#define APAR_CPU_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

namespace apar {
namespace cpu {

// Keys are summed in chunks that start at multiples of the chunk length, and chunks are merged in order.
// Both depend on key indices only, which makes the result independent of the rest of the step.
enum { kMaxChunkKeys = 256 };

// Queries that share the keys of one pass; 16 x 256 scores fit in the first-level cache.
enum { kTileQueries = 16 };

struct Pool {
  void* data;
  int64_t num_blocks;
  int32_t num_kv_heads;
  int32_t block_size;
  int32_t head_dim;
  int32_t half;  // elements are IEEE float16
};

// A (token, query head) and the state of its softmax. `max` and `sum` are in base 2: the logarithm's
// factor is folded into q.
struct Query {
  const float* q;       // [head_dim] rotated and scaled
  float* out;           // [head_dim] weighted sum of values, divided by `sum` at the end
  const int32_t* mask;  // the token's mask words; null: causal
  int32_t mask_bits;    // bits in `mask`
  int32_t context;      // keys before the row's step tokens: all visible
  int32_t limit;        // keys from here on are invisible
  float max;
  float sum;
};

// Queries over chunks first .. last - 1 of the keys that `table` lists.
struct Tile {
  const Pool* pool;
  const int32_t* table;
  Query* queries;
  int32_t count;  // <= kTileQueries
  int32_t kv_head;
  int32_t chunk_keys;
  int32_t first_chunk;
  int32_t last_chunk;
  // Null: chunks are merged into the queries. Otherwise query i's part of chunk c goes to
  // partials + (c * partial_queries + i) * (head_dim + 2): max, sum, values.
  float* partials;
  int32_t partial_queries;
};

// Step 1 to 3 of the contract for one key/value head: copies, RoPE, writes; q of the head's group is
// rotated, scaled and left in `q`.
struct Write {
  const Pool* pool;
  const float* qkv;
  const float* const* rope;  // [num_tokens] cos [head_dim / 2], sin [head_dim / 2]; null for padding
  const int32_t* slots;
  const int32_t* copies;
  void* copy_buffer;  // this head's own, num_copies * 2 * head_dim elements
  float* q;           // [num_tokens, num_heads, head_dim]
  float* attn;        // rows of padding tokens are cleared
  int64_t num_tokens;
  int64_t num_copies;
  int32_t num_heads;
  int32_t kv_head;
  float q_scale;
};

// `half` of the pool chooses the element type inside.
struct Kernels {
  const char* name;
  int vector_width;
  void (*write)(const Write&);
  void (*attend)(const Tile&);
  // Merges chunk parts (see Tile::partials) of a query in order, starting at `part`, `count` of them
  // `stride` floats apart.
  void (*merge)(Query& query, const float* part, int64_t stride, int32_t count, int32_t head_dim);
  void (*finish)(Query& query, int32_t head_dim);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_KERNELS_H_
