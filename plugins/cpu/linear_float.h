// Linear's kernels of float32, float16 and bfloat16 weights; see linear_simd.h.
#ifndef APAR_CPU_LINEAR_FLOAT_H_
#define APAR_CPU_LINEAR_FLOAT_H_

#include "cpu/linear_inputs.h"
#include "cpu/linear_segment.h"

namespace apar {
namespace cpu {
namespace {

template <class V>
struct Float32 {
  static constexpr int kTogether = 1;
  using Element = float;
  static typename V::Reg load(const float* p, int) { return V::load(p); }
};

template <class V>
struct Float16 {
  static constexpr int kTogether = 1;
  using Element = uint16_t;
  static typename V::Reg load(const uint16_t* p, int) { return V::load(p); }
};

template <class V>
struct Bfloat16 {
  static constexpr int kTogether = 2;
  using Element = uint16_t;
  static typename V::Reg load(const uint16_t* p, int i) {
    const typename V::Int pair = V::codes(reinterpret_cast<const uint8_t*>(p));
    return i == 0 ? V::low_bfloat16(pair) : V::high_bfloat16(pair);
  }
};

template <class V, class F>
struct FloatLinear {
  using Reg = typename V::Reg;
  using Element = typename F::Element;
  static constexpr int W = V::kWidth, kVectors = kLinearTile / W, kTogether = F::kTogether;
  static constexpr int kMostTokens = V::kFloatTokens, kStepBytes = kLinearTile * kTogether * sizeof(Element);
  static constexpr bool kHasZeros = false;
  // Few tokens leave registers for several tiles, and need them: each sum waits for its last addition.
  static constexpr int kTilesOfOne = 4, kTilesOfTwo = 2;

  // For N tokens and kTiles tiles.
  template <int N, int kTiles, bool>
  static void segment(const LinearCall& call, const Segment& at, int64_t token, float* sums) {
    const int64_t tile_size = call.steps * kLinearTile * kTogether;
    const Element* w =
        static_cast<const Element*>(call.weight) + at.tile * tile_size + at.first * kLinearTile * kTogether;
    Reg sum[N][kTiles * kVectors];
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < kTiles * kVectors; ++v) sum[n][v] = V::set(0.0f);
    const float* x[N];
    for (int n = 0; n < N; ++n)
      x[n] = static_cast<const float*>(call.values) + (token + n) * call.value_stride + at.first * kTogether;
    const char* ahead = at.ahead;
    for (int64_t k = at.first; k < at.last; ++k, w += kLinearTile * kTogether) {
      // So few tokens that several tiles are taken do little but read: the processor fetches ahead by itself, the
      // faster the more streams there are.
      if (kTiles == 1) __builtin_prefetch(ahead);
      ahead += at.ahead_stride;
      for (int i = 0; i < kTogether; ++i) {
        // One weight vector at a time: registers are few.
        Reg input[N];
        for (int n = 0; n < N; ++n) input[n] = V::set(x[n][i]);
        for (int t = 0; t < kTiles; ++t)
          for (int v = 0; v < kVectors; ++v) {
            const Reg value = F::load(w + t * tile_size + v * W * kTogether, i);
            for (int n = 0; n < N; ++n)
              sum[n][t * kVectors + v] = V::fma(input[n], value, sum[n][t * kVectors + v]);
          }
      }
      for (int n = 0; n < N; ++n) x[n] += kTogether;
    }
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < kTiles * kVectors; ++v) {
        float* to = sums + v / kVectors * kTokenBlock * kLinearTile + n * kLinearTile + v % kVectors * W;
        V::store(to, V::add(sum[n][v], V::load(to)));
      }
  }

  static Reg scale(const LinearCall&, int64_t, int) { return V::set(1.0f); }

  static void prepare(const LinearCall& call, int64_t token) {
    Inputs<V> inputs(call, token);
    float* to = static_cast<float*>(call.values) + token * call.value_stride;
    const int64_t columns = call.steps * kTogether;
    for (int64_t k = 0; k < columns; k += kLinearSegment) {
      const int64_t left = columns - k;
      inputs.take(k, left < kLinearSegment ? left : int64_t{kLinearSegment}, to + k);
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_LINEAR_FLOAT_H_
