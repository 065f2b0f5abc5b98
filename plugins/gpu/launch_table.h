/*
 * The launch table: ForkAttention's GPU kernels, compiled ahead of time, in one file, and how to launch them.
 *
 * `python -m apar.plugins.gpu.pack -o FILE` writes it: a header, `entry_count` entries, then the cubins. Everything
 * is little-endian, offsets count from the start of the file. A host that knows only shapes can launch all of it:
 * whatever depends on values (ragged rows, shared prefixes, how keys are split) is worked out by the `plan` kernel.
 *
 * One step, per layer, on one stream:
 *   1. copy_read, copy_write         only where C > 0
 *   2. rope_write
 *   3. plan                          the plan depends on no layer: once a step is enough, if it can be kept
 *   4. attend
 *   5. merge                         always: it also writes the zeros of padding tokens
 *
 * Padding for fixed shapes: slot copies that hold -1 are skipped, groups without rows and rows without tokens are
 * nothing, tokens of slot -1 get zeros.
 *
 * qkv, q, pool, attn have the entry's dtype. All pointers must be aligned to 16 bytes. For symbols see fork_attention.h.
 */
#ifndef APAR_GPU_LAUNCH_TABLE_H_
#define APAR_GPU_LAUNCH_TABLE_H_

#include <stdint.h>

#define APAR_GPU_TABLE_VERSION 1
#define APAR_GPU_TABLE_MAGIC "APARGPU"

typedef struct AparGpuTableHeader {
  char magic[8];          /* APAR_GPU_TABLE_MAGIC with its final zero */
  uint32_t version;       /* APAR_GPU_TABLE_VERSION */
  uint32_t abi_version;   /* APAR_ABI_VERSION of fork_attention.h */
  uint32_t header_size;   /* sizeof(AparGpuTableHeader) */
  uint32_t entry_size;    /* sizeof(AparGpuKernel) */
  uint32_t entry_count;
  uint32_t reserved;      /* 0 */
  uint64_t file_size;
  uint64_t checksum;      /* apar_gpu_checksum of everything after the header */
  char compiler[32];      /* such as "triton 3.9.0" */
} AparGpuTableHeader;

typedef enum AparGpuKind {
  APAR_GPU_COPY_READ = 1,
  APAR_GPU_COPY_WRITE = 2,
  APAR_GPU_ROPE_WRITE = 3,
  APAR_GPU_PLAN = 4,
  APAR_GPU_ATTEND = 5,
  APAR_GPU_MERGE = 6
} AparGpuKind;

typedef enum AparGpuDtype { APAR_GPU_ANY = 0, APAR_GPU_FLOAT16 = 1, APAR_GPU_BFLOAT16 = 2 } AparGpuDtype;

/* What a kernel takes, in the order of `arguments`: device pointers, then int32, float and int64 values. */
typedef enum AparGpuArgument {
  APAR_GPU_END = 0,
  APAR_GPU_QKV = 1,
  APAR_GPU_Q = 2, /* workspace */
  APAR_GPU_POOL = 3,
  APAR_GPU_STEP_PLAN = 4, /* workspace, or kept from an earlier layer of the step */
  APAR_GPU_BLOCK_TABLE = 5,
  APAR_GPU_SLOT_MAPPING = 6,
  APAR_GPU_TREE_MASK = 7,
  APAR_GPU_OUT = 8,
  APAR_GPU_PART_OUT = 9,   /* workspace */
  APAR_GPU_PART_LSE = 10,  /* workspace */
  APAR_GPU_ERRORS = 11,    /* int32 [1]; null unless APAR_GPU_CHECKED */
  APAR_GPU_POSITION_IDS = 12,
  APAR_GPU_INV_FREQ = 13,  /* float32 [D / 2] in device memory */
  APAR_GPU_SLOT_COPIES = 14,
  APAR_GPU_COPY_SCRATCH = 15, /* workspace */
  APAR_GPU_QUERY_START = 16,
  APAR_GPU_KV_LEN = 17,
  APAR_GPU_PREFIX_ROWS = 18,
  APAR_GPU_PREFIX_BLOCKS = 19,
  APAR_GPU_PLAN_SCRATCH = 20, /* workspace */
  APAR_GPU_NULL = 31,         /* a null pointer: the compiler's own scratch, which no kernel here needs */
  APAR_GPU_NUM_BLOCKS = 32,   /* int32 from here: B */
  APAR_GPU_TABLE_WIDTH = 33,  /* MB */
  APAR_GPU_MASK_WORDS = 34,   /* W */
  APAR_GPU_NUM_HEADS = 35,
  APAR_GPU_NUM_KV_HEADS = 36,
  APAR_GPU_NUM_COPIES = 37,
  APAR_GPU_NUM_TOKENS = 38,
  APAR_GPU_NUM_ROWS = 39,
  APAR_GPU_NUM_GROUPS = 40,
  APAR_GPU_ITEMS = 41, /* fields of AparGpuSizes */
  APAR_GPU_TILES = 42,
  APAR_GPU_BUDGET = 43,
  APAR_GPU_TILE_TOKENS = 44,
  APAR_GPU_HEADS_PER_GROUP = 45,
  APAR_GPU_MASKED = 46, /* W > 0 */
  APAR_GPU_SPLITS = 47,
  APAR_GPU_SCALE = 64, /* float from here */
  APAR_GPU_ROPE_SCALE = 65,
  APAR_GPU_LAYER_STRIDE = 96 /* int64: elements between the pools of two layers; 0 where one layer is copied */
} AparGpuArgument;

enum { APAR_GPU_CHECKED = 1 };

typedef struct AparGpuKernel {
  uint32_t kind;       /* AparGpuKind */
  uint32_t sm;         /* 80: every device of compute capability 8.x; others: exactly that one, 90 is 9.0 */
  uint32_t dtype;      /* AparGpuDtype; APAR_GPU_ANY where it does not matter, and so for the next three: 0 */
  uint32_t head_dim;
  uint32_t block_size;
  uint32_t tile;       /* AparGpuSizes.tile */
  uint32_t flags;      /* APAR_GPU_CHECKED: checks ids and sets bits of *errors instead of touching what is out of bounds */
  uint32_t num_warps;  /* threads of a block = 32 * num_warps, in x */
  uint32_t shared_bytes; /* dynamic; above 48 KiB set CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES first */
  uint32_t registers;
  uint32_t spill_bytes; /* stores and loads */
  uint32_t argument_count;
  uint8_t arguments[32]; /* AparGpuArgument */
  char symbol[64];       /* for cuModuleGetFunction */
  uint64_t cubin_offset; /* 16-byte aligned */
  uint64_t cubin_size;
} AparGpuKernel;

/* FNV-1a over 64 bits. */
static inline uint64_t apar_gpu_checksum(const void* data, uint64_t size) {
  const unsigned char* bytes = (const unsigned char*)data;
  uint64_t hash = 0xcbf29ce484222325ull;
  for (uint64_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  return hash;
}

enum {
  APAR_GPU_SMALL_TILE = 16,
  APAR_GPU_LARGE_TILE = 64,
  APAR_GPU_SPLIT_PROGRAMS = 512,
  APAR_GPU_MAX_SPLIT_TOKENS = 4096,
  APAR_GPU_HEADS_PER_PROGRAM = 8,
  APAR_GPU_PLAN_HEADER = 8,
  APAR_GPU_ITEM_FIELDS = 8,
  APAR_GPU_PART_FIELDS = 6
};

/* Sizes of a step's launches, from shapes alone; plugins/gpu/sizes.py is the same in Python. */
typedef struct AparGpuSizes {
  int32_t heads_per_group; /* H / K, at most APAR_GPU_LARGE_TILE */
  int32_t tile;            /* picks the attend kernel */
  int32_t tile_tokens;
  int32_t splits;          /* 0 or 1 */
  int32_t budget;
  int32_t tiles;
  int32_t items;
  int64_t parts;           /* partial outputs: part_out float32 [max(parts, 1), H, D], part_lse float32 [.., H] */
  int64_t plan_size;       /* int32 elements of the plan */
  int64_t scratch_size;    /* int32 elements of the plan kernel's scratch */
} AparGpuSizes;

static inline AparGpuSizes apar_gpu_sizes(int64_t tokens, int64_t rows, int64_t groups, int32_t num_heads,
                                          int32_t num_kv_heads) {
  AparGpuSizes s;
  s.heads_per_group = num_heads / num_kv_heads;
  s.tile = s.heads_per_group <= APAR_GPU_SMALL_TILE &&
                   tokens * s.heads_per_group <= 2 * APAR_GPU_SMALL_TILE * rows
               ? APAR_GPU_SMALL_TILE
               : APAR_GPU_LARGE_TILE;
  s.tile_tokens = s.tile / s.heads_per_group;
  s.splits = tokens <= APAR_GPU_MAX_SPLIT_TOKENS;
  s.budget = s.splits ? (APAR_GPU_SPLIT_PROGRAMS + num_kv_heads - 1) / num_kv_heads : 0;
  int64_t full = tokens / s.tile_tokens;
  int64_t shared = groups < rows / 2 ? groups : rows / 2;
  s.tiles = (int32_t)(rows + full + (groups > 0 && s.splits ? shared + full : 0));
  s.items = s.tiles + s.budget;
  s.parts = s.splits ? 2 * tokens + (int64_t)s.budget * s.tile_tokens : 0;
  s.plan_size = APAR_GPU_PLAN_HEADER + (int64_t)APAR_GPU_ITEM_FIELDS * s.items + APAR_GPU_PART_FIELDS * tokens;
  s.scratch_size = (tokens + 1) + (rows + 1) + 3 * (groups + 1) + 2 * ((int64_t)s.tiles + 1);
  return s;
}

/* The grid of a kernel. Every dimension is at least 1 (launch nothing where T is 0). */
static inline void apar_gpu_grid(uint32_t kind, const AparGpuSizes* sizes, int64_t tokens, int64_t copies,
                                 int32_t num_heads, int32_t num_kv_heads, uint32_t grid[3]) {
  const int32_t n = APAR_GPU_HEADS_PER_PROGRAM;
  grid[0] = grid[1] = grid[2] = 1;
  switch (kind) {
    case APAR_GPU_COPY_READ:
    case APAR_GPU_COPY_WRITE: /* one layer */
      grid[0] = (uint32_t)copies;
      grid[1] = (uint32_t)(2 * ((num_kv_heads + n - 1) / n));
      break;
    case APAR_GPU_ROPE_WRITE:
      grid[0] = (uint32_t)tokens;
      grid[1] = (uint32_t)((num_heads + 2 * num_kv_heads + n - 1) / n);
      break;
    case APAR_GPU_ATTEND:
      grid[0] = (uint32_t)sizes->items;
      grid[1] = (uint32_t)num_kv_heads;
      break;
    case APAR_GPU_MERGE:
      grid[0] = (uint32_t)tokens;
      grid[1] = (uint32_t)((num_heads + n - 1) / n);
      break;
    default: /* APAR_GPU_PLAN */
      break;
  }
}

/* Bytes of workspace, with every region aligned to 256: where each begins, and the total. Regions are used anew by
 * every layer; only the plan may be kept over the layers of a step. */
typedef struct AparGpuWorkspace {
  int64_t q;            /* 2 T H D */
  int64_t part_out;     /* 4 max(parts, 1) H D */
  int64_t part_lse;     /* 4 max(parts, 1) H */
  int64_t plan;         /* 4 plan_size */
  int64_t plan_scratch; /* 4 scratch_size */
  int64_t copy_scratch; /* 2 * 2 C K D */
  int64_t total;
} AparGpuWorkspace;

static inline int64_t apar_gpu_aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

static inline AparGpuWorkspace apar_gpu_workspace(const AparGpuSizes* sizes, int64_t tokens, int64_t copies,
                                                  int32_t num_heads, int32_t num_kv_heads, int32_t head_dim) {
  AparGpuWorkspace w;
  int64_t parts = sizes->parts > 0 ? sizes->parts : 1;
  w.q = 0;
  w.part_out = w.q + apar_gpu_aligned(2 * tokens * num_heads * head_dim);
  w.part_lse = w.part_out + apar_gpu_aligned(4 * parts * num_heads * head_dim);
  w.plan = w.part_lse + apar_gpu_aligned(4 * parts * num_heads);
  w.plan_scratch = w.plan + apar_gpu_aligned(4 * sizes->plan_size);
  w.copy_scratch = w.plan_scratch + apar_gpu_aligned(4 * sizes->scratch_size);
  w.total = w.copy_scratch + apar_gpu_aligned(4 * copies * num_kv_heads * head_dim);
  return w;
}

#endif /* APAR_GPU_LAUNCH_TABLE_H_ */
