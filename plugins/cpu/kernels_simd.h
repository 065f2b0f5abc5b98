// The kernels, written once over a vector trait V. Each kernels_<isa>.cpp defines its trait and
// instantiates `Simd<V>`; everything here has internal linkage (see kernels.h) and neither allocates nor
// throws.
//
// A trait gives: Reg, kWidth, kKeyTile (vectors of keys a four-query score tile holds), kDimTile (the same
// for dimensions), load (float or float16), store (float or float16), set, mul, fma (a * b + c), max
// (the second operand where either is NaN), round, pow2 (2^n for integral n in [-126, 127]),
// zero_below (x where y >= limit or y is NaN, else 0), sum and maximum over the lanes in a fixed order, and
// the scalar fma, to_half, to_float.
//
// Every product that is added is written as fma: left to the compiler's contraction, the same
// expression might be rounded differently in two places, and results would depend on which one ran.
#ifndef APAR_CPU_KERNELS_SIMD_H_
#define APAR_CPU_KERNELS_SIMD_H_

#include <math.h>
#include <string.h>

#include "cpu/kernels.h"
#include "cpu/vector_math.h"

namespace apar {
namespace cpu {
namespace {

inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// Neighbouring keys of one block.
struct Run {
  int64_t panel;    // element offset of the block's panel
  int32_t offset;   // first key's place in the block
  int32_t key;      // first key, counted from the chunk's start
  int32_t count;
};

template <class V, class T>
struct Simd {
  using Reg = typename V::Reg;
  static constexpr int W = V::kWidth;

  static int64_t panel_size(const Pool& pool) { return int64_t{pool.block_size} * pool.head_dim; }

  static int64_t panel(const Pool& pool, int which, int64_t block, int head) {
    return ((which * pool.num_blocks + block) * pool.num_kv_heads + head) * panel_size(pool);
  }

  static float scalar(float x) { return x; }
  static float scalar(uint16_t x) { return V::to_float(x); }
  static void put(float x, float* to) { *to = x; }
  static void put(float x, uint16_t* to) { *to = V::to_half(x); }

  // ---------------------------------------------------------------- copies, RoPE, writes

  static void copy_slots(const Write& w) {
    const Pool& pool = *w.pool;
    T* data = static_cast<T*>(pool.data);
    const int32_t dim = pool.head_dim;
    const int32_t size = pool.block_size;
    // All sources first: a target may be the source of another copy.
    T* buffer = static_cast<T*>(w.copy_buffer);
    for (int64_t i = 0; i < w.num_copies; ++i, buffer += 2 * dim) {
      const int32_t slot = w.copies[2 * i];
      const T* k = data + panel(pool, 0, slot / size, w.kv_head) + slot % size;
      const T* v = data + panel(pool, 1, slot / size, w.kv_head) + int64_t{slot % size} * dim;
      for (int32_t d = 0; d < dim; ++d) buffer[d] = k[int64_t{d} * size];
      memcpy(buffer + dim, v, sizeof(T) * dim);
    }
    buffer = static_cast<T*>(w.copy_buffer);
    for (int64_t i = 0; i < w.num_copies; ++i, buffer += 2 * dim) {
      const int32_t slot = w.copies[2 * i + 1];
      T* k = data + panel(pool, 0, slot / size, w.kv_head) + slot % size;
      T* v = data + panel(pool, 1, slot / size, w.kv_head) + int64_t{slot % size} * dim;
      for (int32_t d = 0; d < dim; ++d) k[int64_t{d} * size] = buffer[d];
      memcpy(v, buffer + dim, sizeof(T) * dim);
    }
  }

  // Elements i and i + dim / 2 of a head, rotated and multiplied by `scale`, to `to` with `stride`
  // elements between neighbours.
  template <class To>
  static void rotate(const float* x, const float* rope, int32_t dim, float scale, To* to, int64_t stride) {
    const int32_t half = dim / 2;
    const float* cosine = rope;
    const float* sine = rope + half;
    const Reg factor = V::set(scale);
    const Reg minus = V::set(-1.0f);
    int32_t i = 0;
    for (; i + W <= half; i += W) {
      const Reg a = V::load(x + i), b = V::load(x + half + i);
      const Reg c = V::load(cosine + i), s = V::load(sine + i);
      const Reg first = V::mul(V::fma(a, c, V::mul(V::mul(b, s), minus)), factor);
      const Reg second = V::mul(V::fma(b, c, V::mul(a, s)), factor);
      if (stride == 1) {
        V::store(to + i, first);
        V::store(to + half + i, second);
      } else {
        To lanes[2 * W];
        V::store(lanes, first);
        V::store(lanes + W, second);
        for (int32_t j = 0; j < W; ++j) {
          to[(i + j) * stride] = lanes[j];
          to[(half + i + j) * stride] = lanes[W + j];
        }
      }
    }
    for (; i < half; ++i) {
      const float a = x[i], b = x[half + i], c = cosine[i], s = sine[i];
      const float bs = b * s, as = a * s;
      put(V::fma(a, c, -bs) * scale, to + i * stride);
      put(V::fma(b, c, as) * scale, to + (half + i) * stride);
    }
  }

  static void write(const Write& w) {
    if (w.num_copies > 0) copy_slots(w);
    const Pool& pool = *w.pool;
    T* data = static_cast<T*>(pool.data);
    const int32_t dim = pool.head_dim;
    const int32_t size = pool.block_size;
    const int32_t group = w.num_heads / pool.num_kv_heads;
    const int64_t width = int64_t{w.num_heads + 2 * pool.num_kv_heads} * dim;
    for (int64_t t = 0; t < w.num_tokens; ++t) {
      const int64_t heads = (t * w.num_heads + int64_t{w.kv_head} * group) * dim;
      const int32_t slot = w.slots[t];
      if (slot < 0) {
        memset(w.attn + heads, 0, sizeof(float) * group * dim);
        continue;
      }
      const float* token = w.qkv + t * width;
      const float* rope = w.rope[t];
      for (int32_t g = 0; g < group; ++g) {
        rotate(token + (int64_t{w.kv_head} * group + g) * dim, rope, dim, w.q_scale, w.q + heads + int64_t{g} * dim, 1);
      }
      const int32_t block = slot / size, offset = slot % size;
      rotate(token + int64_t{w.num_heads + w.kv_head} * dim, rope, dim, 1.0f,
             data + panel(pool, 0, block, w.kv_head) + offset, size);
      const float* value = token + int64_t{w.num_heads + pool.num_kv_heads + w.kv_head} * dim;
      T* to = data + panel(pool, 1, block, w.kv_head) + int64_t{offset} * dim;
      int32_t d = 0;
      for (; d + W <= dim; d += W) V::store(to + d, V::load(value + d));
      for (; d < dim; ++d) put(value[d], to + d);
    }
  }

  // ---------------------------------------------------------------- scores

  // q.k for N queries and M vectors of keys. Dimensions are added in order, so every tile shape gives
  // the same bits.
  //
  // Panels are scattered and too short for the hardware to see a pattern, so the next keys (`keys` goes on
  // beyond M) and the values of these keys, `to_values` elements away, are fetched ahead of need.
  template <int N, int M>
  static void score_tile(const float* const* q, const T* const* keys, int64_t to_values, int64_t stride, int32_t dim,
                         float* const* out, const int32_t* place) {
    Reg sum[N][M];
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) sum[n][m] = V::set(0.0f);
    constexpr int kLine = 64 / sizeof(T) > W ? 64 / sizeof(T) / W : 1;  // vectors in a cache line
    const T* row[M];
    for (int m = 0; m < M; ++m) row[m] = keys[m];
    for (int32_t d = 0; d < dim; ++d) {
      Reg k[M];
      for (int m = 0; m < M; ++m) k[m] = V::load(row[m] + d * stride);
      for (int m = 0; m < M; m += kLine) {
        __builtin_prefetch(keys[M + m] + d * stride, 0, 2);
        __builtin_prefetch(row[m] + d * stride + to_values, 0, 2);
      }
      for (int n = 0; n < N; ++n) {
        const Reg x = V::set(q[n][d]);
        for (int m = 0; m < M; ++m) sum[n][m] = V::fma(x, k[m], sum[n][m]);
      }
    }
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) V::store(out[n] + place[m], sum[n][m]);
  }

  template <int N, int M>
  static int score_tiles(const float* const* q, const T* const* keys, int64_t to_values, int64_t stride, int32_t dim,
                         float* const* out, const int32_t* place, int from, int count) {
    for (; from + M <= count; from += M) score_tile<N, M>(q, keys + from, to_values, stride, dim, out, place + from);
    return from;
  }

  template <int N>
  static void score_queries(const float* const* q, const T* const* keys, int64_t to_values, int64_t stride, int32_t dim,
                            float* const* out, const int32_t* place, int count) {
    constexpr int kMost = N == 4 ? V::kKeyTile : (N == 2 ? 4 : 8);
    int done = 0;
    if constexpr (kMost >= 8) done = score_tiles<N, 8>(q, keys, to_values, stride, dim, out, place, done, count);
    if constexpr (kMost >= 4) done = score_tiles<N, 4>(q, keys, to_values, stride, dim, out, place, done, count);
    done = score_tiles<N, 2>(q, keys, to_values, stride, dim, out, place, done, count);
    score_tiles<N, 1>(q, keys, to_values, stride, dim, out, place, done, count);
  }

  static void scores(const Query* queries, int count, const T* k_data, const T* v_data, const Run* runs, int num_runs,
                     int32_t size, int32_t dim, float (*out)[kMaxChunkKeys + W]) {
    // Whole vectors; the last one may hold keys past the tile's end, which stay inside the block.
    const T* keys[kMaxChunkKeys / W + 9];
    int32_t place[kMaxChunkKeys / W + 1];
    int vectors = 0;
    for (int r = 0; r < num_runs; ++r) {
      const Run& run = runs[r];
      for (int32_t i = 0; i < run.count && run.offset + i + W <= size; i += W) {
        keys[vectors] = k_data + run.panel + run.offset + i;
        place[vectors++] = run.key + i;
      }
    }
    for (int m = 0; m < 8; ++m) keys[vectors + m] = k_data + runs[0].panel;  // nothing left to fetch
    const int64_t to_values = v_data - k_data;
    int n = 0;
    const float* q[kTileQueries];
    float* to[kTileQueries];
    for (int i = 0; i < count; ++i) {
      q[i] = queries[i].q;
      to[i] = out[i];
    }
    // Few vectors at a time, so that their panels stay in the first-level cache for all queries.
    for (int v = 0; v < vectors; v += 8) {
      const int m = smaller(8, vectors - v);
      n = 0;
      for (; n + 4 <= count; n += 4) score_queries<4>(q + n, keys + v, to_values, size, dim, to + n, place + v, m);
      for (; n + 2 <= count; n += 2) score_queries<2>(q + n, keys + v, to_values, size, dim, to + n, place + v, m);
      for (; n < count; ++n) score_queries<1>(q + n, keys + v, to_values, size, dim, to + n, place + v, m);
    }
    // Keys that do not fill a vector: only in blocks whose size is no multiple of the vector's. After the
    // whole vectors, because those overwrite the places behind them.
    for (int r = 0; r < num_runs; ++r) {
      const Run& run = runs[r];
      int32_t i = 0;
      while (i < run.count && run.offset + i + W <= size) i += W;
      if (i >= run.count) continue;
      const T* k = k_data + run.panel + run.offset;
      for (n = 0; n < count; ++n) {
        float sum[W] = {};
        for (int32_t d = 0; d < dim; ++d)
          for (int32_t j = i; j < run.count; ++j)
            sum[j - i] = V::fma(q[n][d], scalar(k[int64_t{d} * size + j]), sum[j - i]);
        for (int32_t j = i; j < run.count; ++j) to[n][run.key + j] = sum[j - i];
      }
    }
  }

  // ---------------------------------------------------------------- softmax

  static bool visible(const Query& query, int32_t key) {
    if (key >= query.limit) return false;
    if (key < query.context || query.mask == nullptr) return true;
    const int32_t bit = key - query.context;
    return bit < query.mask_bits && (static_cast<uint32_t>(query.mask[bit / 32]) >> (bit % 32) & 1u) != 0;
  }

  // First key from which on visibility has to be asked key by key.
  static int32_t all_visible(const Query& query) {
    return query.mask == nullptr ? query.limit : smaller(query.context, query.limit);
  }

  // Scores of `keys` keys from index `first` on become weights; false if none of them is visible. A NaN
  // among the scores becomes a NaN weight, so it reaches the output.
  static bool softmax(const Query& query, int32_t first, int32_t keys, float* s, float* max, float* sum) {
    const int32_t dense = larger(0, all_visible(query) - first);
    bool any = dense > 0;
    for (int32_t k = dense; k < keys; ++k) {
      if (visible(query, first + k)) {
        any = true;
      } else {
        s[k] = -INFINITY;
      }
    }
    const int32_t padded = (keys + W - 1) / W * W;
    for (int32_t k = keys; k < padded; ++k) s[k] = -INFINITY;
    if (!any) {
      memset(s, 0, sizeof(float) * padded);
      return false;
    }
    Reg top = V::set(-INFINITY);
    for (int32_t k = 0; k < padded; k += W) top = V::max(V::load(s + k), top);
    *max = V::maximum(top);
    if (*max == -INFINITY) *max = 0.0f;  // nothing but NaN and -inf; -inf would say "no visible key"
    const Reg shift = V::set(-*max);
    const Reg one = V::set(1.0f);
    Reg total = V::set(0.0f);
    for (int32_t k = 0; k < padded; k += W) {
      const Reg p = exp2_of<V>(V::fma(V::load(s + k), one, shift));
      V::store(s + k, p);
      total = V::fma(p, one, total);
    }
    *sum = V::sum(total);
    return true;
  }

  // ---------------------------------------------------------------- values

  // Weighted sums of N queries over M vectors of dimensions. Keys below `dense` are visible to all
  // queries; from there on a weight of 0 may mean "invisible", and the value is not touched: it may be
  // another token's NaN.
  template <int N, int M>
  static void value_tile(const float* const* p, const T* v_data, const Run* runs, int num_runs, int32_t dim,
                         int32_t dense, Reg (*sum)[M]) {
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) sum[n][m] = V::set(0.0f);
    for (int r = 0; r < num_runs; ++r) {
      const Run& run = runs[r];
      const T* v = v_data + run.panel + int64_t{run.offset} * dim;
      const int32_t end = run.key + run.count;
      int32_t k = run.key;
      for (; k < smaller(end, dense); ++k, v += dim) {
        Reg x[M];
        for (int m = 0; m < M; ++m) x[m] = V::load(v + m * W);
        for (int n = 0; n < N; ++n) {
          const Reg weight = V::set(p[n][k]);
          for (int m = 0; m < M; ++m) sum[n][m] = V::fma(weight, x[m], sum[n][m]);
        }
      }
      for (; k < end; ++k, v += dim) {
        Reg x[M];
        for (int m = 0; m < M; ++m) x[m] = V::load(v + m * W);
        for (int n = 0; n < N; ++n) {
          if (p[n][k] == 0.0f) continue;
          const Reg weight = V::set(p[n][k]);
          for (int m = 0; m < M; ++m) sum[n][m] = V::fma(weight, x[m], sum[n][m]);
        }
      }
    }
  }

  // How a chunk's sum joins what a query has so far: out = out * keep + chunk * add.
  struct Join {
    float* out;
    float keep;
    float add;
    bool fresh;  // nothing so far: out = chunk
    bool skip;   // the chunk has no visible key
  };

  static Join join(Query& query, float max, float sum) {
    Join j = {query.out, 0.0f, 0.0f, false, max == -INFINITY};
    if (j.skip) return j;
    if (query.max == -INFINITY) {
      j.fresh = true;
      query.max = max;
      query.sum = sum;
      return j;
    }
    const float top = query.max > max ? query.max : max;
    j.keep = ::exp2f(query.max - top);
    j.add = ::exp2f(max - top);
    const float added = sum * j.add;
    query.sum = V::fma(query.sum, j.keep, added);
    query.max = top;
    return j;
  }

  static void joined(const Join& j, int32_t d, Reg chunk) {
    float* out = j.out + d;
    V::store(out, j.fresh ? chunk : V::fma(V::load(out), V::set(j.keep), V::mul(chunk, V::set(j.add))));
  }

  static void joined(const Join& j, int32_t d, float chunk) {
    float* out = j.out + d;
    const float added = chunk * j.add;
    *out = j.fresh ? chunk : V::fma(*out, j.keep, added);
  }

  template <int N, int M>
  static int32_t value_tiles(const Join* joins, const float* const* p, const T* v_data, const Run* runs, int num_runs,
                             int32_t dim, int32_t dense, int32_t d) {
    for (; d + M * W <= dim; d += M * W) {
      Reg sum[N][M];
      value_tile<N, M>(p, v_data + d, runs, num_runs, dim, dense, sum);
      for (int n = 0; n < N; ++n) {
        if (joins[n].skip) continue;
        for (int m = 0; m < M; ++m) joined(joins[n], d + m * W, sum[n][m]);
      }
    }
    return d;
  }

  template <int N>
  static void values(const Join* joins, const float* const* p, const T* v_data, const Run* runs, int num_runs,
                     int32_t dim, int32_t dense) {
    constexpr int kMost = N == 4 ? V::kDimTile : (N == 2 ? 4 : 8);
    int32_t d = 0;
    if constexpr (kMost >= 8) d = value_tiles<N, 8>(joins, p, v_data, runs, num_runs, dim, dense, d);
    if constexpr (kMost >= 4) d = value_tiles<N, 4>(joins, p, v_data, runs, num_runs, dim, dense, d);
    d = value_tiles<N, 2>(joins, p, v_data, runs, num_runs, dim, dense, d);
    d = value_tiles<N, 1>(joins, p, v_data, runs, num_runs, dim, dense, d);
    for (; d < dim; ++d) {
      for (int n = 0; n < N; ++n) {
        if (joins[n].skip) continue;
        float sum = 0.0f;
        for (int r = 0; r < num_runs; ++r) {
          const T* v = v_data + runs[r].panel + int64_t{runs[r].offset} * dim + d;
          for (int32_t i = 0; i < runs[r].count; ++i, v += dim) {
            const float weight = p[n][runs[r].key + i];
            if (weight != 0.0f || runs[r].key + i < dense) sum = V::fma(weight, scalar(*v), sum);
          }
        }
        joined(joins[n], d, sum);
      }
    }
  }

  // ---------------------------------------------------------------- one tile

  static void attend(const Tile& tile) {
    const Pool& pool = *tile.pool;
    const int32_t size = pool.block_size, dim = pool.head_dim;
    const T* k_data = static_cast<const T*>(pool.data) + panel(pool, 0, 0, tile.kv_head);
    const T* v_data = static_cast<const T*>(pool.data) + panel(pool, 1, 0, tile.kv_head);
    const int64_t block_stride = pool.num_kv_heads * panel_size(pool);
    int32_t limit = 0;
    for (int i = 0; i < tile.count; ++i) limit = larger(limit, tile.queries[i].limit);

    alignas(64) float s[kTileQueries][kMaxChunkKeys + W];
    Run runs[kMaxChunkKeys];
    for (int32_t chunk = tile.first_chunk; chunk < tile.last_chunk; ++chunk) {
      const int32_t first = chunk * tile.chunk_keys;
      const int32_t keys = smaller(tile.chunk_keys, limit - first);
      if (keys <= 0) break;
      int num_runs = 0;
      for (int32_t k = 0; k < keys;) {
        const int32_t offset = (first + k) % size;
        const int32_t count = smaller(size - offset, keys - k);
        runs[num_runs++] = {tile.table[(first + k) / size] * block_stride, offset, k, count};
        k += count;
      }
      scores(tile.queries, tile.count, k_data, v_data, runs, num_runs, size, dim, s);

      int32_t dense = keys;
      Join joins[kTileQueries];
      const float* p[kTileQueries];
      for (int i = 0; i < tile.count; ++i) {
        Query& query = tile.queries[i];
        float max = -INFINITY, sum = 0.0f;
        softmax(query, first, keys, s[i], &max, &sum);
        dense = smaller(dense, larger(0, all_visible(query) - first));
        p[i] = s[i];
        if (tile.partials != nullptr) {
          float* part = tile.partials + (int64_t{chunk} * tile.partial_queries + i) * (dim + 2);
          part[0] = max;
          part[1] = sum;
          joins[i] = {part + 2, 0.0f, 0.0f, true, max == -INFINITY};
        } else {
          joins[i] = join(query, max, sum);
        }
      }
      int n = 0;
      for (; n + 4 <= tile.count; n += 4) values<4>(joins + n, p + n, v_data, runs, num_runs, dim, dense);
      for (; n + 2 <= tile.count; n += 2) values<2>(joins + n, p + n, v_data, runs, num_runs, dim, dense);
      for (; n < tile.count; ++n) values<1>(joins + n, p + n, v_data, runs, num_runs, dim, dense);
    }
  }

  static void merge(Query& query, const float* part, int64_t stride, int32_t count, int32_t dim) {
    for (int32_t c = 0; c < count; ++c, part += stride) {
      const Join j = join(query, part[0], part[1]);
      if (j.skip) continue;
      int32_t d = 0;
      for (; d + W <= dim; d += W) joined(j, d, V::load(part + 2 + d));
      for (; d < dim; ++d) joined(j, d, part[2 + d]);
    }
  }

  static void finish(Query& query, int32_t dim) {
    if (query.max == -INFINITY) {
      memset(query.out, 0, sizeof(float) * dim);
      return;
    }
    const float factor = 1.0f / query.sum;
    const Reg factors = V::set(factor);
    int32_t d = 0;
    for (; d + W <= dim; d += W) V::store(query.out + d, V::mul(V::load(query.out + d), factors));
    for (; d < dim; ++d) query.out[d] *= factor;
  }
};

template <class V>
void write_any(const Write& write) {
  if (write.pool->half) {
    Simd<V, uint16_t>::write(write);
  } else {
    Simd<V, float>::write(write);
  }
}

template <class V>
void attend_any(const Tile& tile) {
  if (tile.pool->half) {
    Simd<V, uint16_t>::attend(tile);
  } else {
    Simd<V, float>::attend(tile);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace apar

// The table of one instruction set.
#define APAR_KERNELS(NAME, V) \
  {NAME, V::kWidth, &write_any<V>, &attend_any<V>, &Simd<V, float>::merge, &Simd<V, float>::finish}

#endif  // APAR_CPU_KERNELS_SIMD_H_
