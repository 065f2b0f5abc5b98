// Linear's kernels of 8-bit and 4-bit codes; see linear_simd.h.
#ifndef APAR_CPU_LINEAR_INTEGER_H_
#define APAR_CPU_LINEAR_INTEGER_H_

#include "cpu/linear_inputs.h"
#include "cpu/linear_segment.h"

namespace apar {
namespace cpu {
namespace {

// Makes sums wait in memory: the compiler would rather have them in registers that it does not have.
inline void keep_in_memory(float* sums) { __asm__ volatile("" : : "r"(sums) : "memory"); }

// The sums of a unit's products with codes start where they remove the code that stands for 0, so that what comes out
// is exact; where there are zero points, that is done afterwards.
template <class V>
struct Int8Linear {
  using Reg = typename V::Reg;
  using Int = typename V::Int;
  static constexpr int W = V::kWidth, kVectors = kLinearTile / W;
  static constexpr int kMostTokens = V::kIntegerTokens, kStepBytes = kLinearTile * 4, kTogether = 4;
  // So few tokens wait for memory: see FloatLinear::segment.
  static constexpr int kTilesOfOne = 4, kTilesOfTwo = 4;
  static constexpr bool kHasZeros = true;

  // A segment of kTiles tiles for N tokens: one unit without groups, several with them.
  template <int N, int kTiles, bool kZeros>
  static void segment(const LinearCall& call, const Segment& at, int64_t token, float* sums) {
    const int64_t tile_bytes = call.steps * kStepBytes;
    const uint8_t* weight = static_cast<const uint8_t*>(call.weight) + at.tile * tile_bytes + at.first * kStepBytes;
    const int64_t length = call.unit / 4;
    const char* ahead = at.ahead;
    for (int64_t step = at.first; step < at.last;) {
      const int64_t end = step + length < at.last ? step + length : at.last;
      const int64_t unit = step / length;
      Int sum[kTiles][N][kVectors];
      const int16_t* x[N];
      for (int n = 0; n < N; ++n) {
        x[n] = static_cast<const int16_t*>(call.values) + (token + n) * call.value_stride + step * 4;
        const Int start = kZeros ? V::zero() : V::set_int(call.units[(token + n) * call.unit_stride + unit].start);
        for (int t = 0; t < kTiles; ++t)
          for (int v = 0; v < kVectors; ++v) sum[t][n][v] = start;
      }
      for (; step < end; ++step, weight += kStepBytes) {
        if (kTiles == 1) __builtin_prefetch(ahead);
        ahead += at.ahead_stride;
        for (int t = 0; t < kTiles; ++t) add_step<N>(weight + t * tile_bytes, x, sum[t]);
        for (int n = 0; n < N; ++n) x[n] += 4;
      }
      keep_in_memory(sums);
      for (int t = 0; t < kTiles; ++t)
        add_unit<N, kZeros>(call, at.tile + t, token, unit, sum[t], sums + t * kTokenBlock * kLinearTile);
    }
  }

  static Reg scale(const LinearCall& call, int64_t tile, int v) {
    return call.channel_scales != nullptr ? V::load(call.channel_scales + tile * kLinearTile + v * W) : V::set(1.0f);
  }

  static void prepare(const LinearCall& call, int64_t token) {
    Inputs<V> inputs(call, token);
    int16_t* to = static_cast<int16_t*>(call.values) + token * call.value_stride;
    Unit* units = call.units + token * call.unit_stride;
    const int64_t columns = call.steps * 4;
    for (int64_t k = 0; k < columns; k += call.unit, ++units) {
      alignas(64) float channels[kLinearSegment];
      const int64_t left = columns - k;
      const int64_t count = left < call.unit ? left : call.unit;
      inputs.take(k, count, channels);
      const Quantizer quantizer(V::peak(channels, count), 32767.0f);
      int32_t sum = 0;
      for (int64_t i = 0; i < count; i += 8) sum += V::to_words(channels + i, quantizer.factor, to + k + i);
      *units = {quantizer.scale, static_cast<float>(sum), -128 * sum};
    }
  }

 private:
  // The products of four channels of a tile.
  template <int N>
  static inline __attribute__((always_inline)) void add_step(const uint8_t* weight, const int16_t* const* x,
                                                             Int (*sum)[kVectors]) {
    Int codes[kVectors];
    for (int v = 0; v < kVectors; ++v) codes[v] = V::codes(weight + v * W * 4);
    for (int i = 0; i < 2; ++i) {
      Int words[kVectors];
      for (int v = 0; v < kVectors; ++v) words[v] = i == 0 ? V::even(codes[v]) : V::odd(codes[v]);
      for (int n = 0; n < N; ++n) {
        const Int input = V::pair(x[n] + i * 2);
        for (int v = 0; v < kVectors; ++v) sum[n][v] = V::dot_words(sum[n][v], words[v], input);
      }
    }
  }

  // A unit's sums of a tile, scaled, to `to`.
  template <int N, bool kZeros>
  static inline __attribute__((always_inline)) void add_unit(const LinearCall& call, int64_t tile, int64_t token,
                                                             int64_t unit, const Int (*sum)[kVectors], float* to) {
    const int64_t group = (tile * call.groups + (call.groups > 1 ? unit : 0)) * kLinearTile;
    for (int v = 0; v < kVectors; ++v) {
      const Int zero = kZeros ? V::widen(call.zeros + group + v * W) : V::zero();
      const Reg scale =
          call.group_scales != nullptr ? V::load_bfloat16(call.group_scales + group + v * W) : V::set(1.0f);
      for (int n = 0; n < N; ++n) {
        const Unit& u = call.units[(token + n) * call.unit_stride + unit];
        const Int exact = kZeros ? V::remove(sum[n][v], zero, static_cast<int32_t>(u.sum)) : sum[n][v];
        float* at = to + n * kLinearTile + v * W;
        V::store(at, V::fma(V::mul(V::convert(exact), V::set(u.scale)), scale, V::load(at)));
      }
    }
  }
};

template <class V>
struct Int4Linear {
  using Reg = typename V::Reg;
  using Int = typename V::Int;
  static constexpr int W = V::kWidth, kVectors = kLinearTile / W;
  static constexpr int kMostTokens = V::kIntegerTokens, kStepBytes = kLinearTile * 4, kTogether = 8;
  // One token waits for memory: see FloatLinear::segment. Two have enough to do.
  static constexpr int kTilesOfOne = 4, kTilesOfTwo = 1;
  static constexpr bool kHasZeros = true;

  template <int N, int kTiles, bool kZeros>
  static void segment(const LinearCall& call, const Segment& at, int64_t token, float* sums) {
    if (call.unit == 16) return units<N, 16, kTiles, kZeros>(call, at, token, sums);
    return units<N, 32, kTiles, kZeros>(call, at, token, sums);
  }

  static Reg scale(const LinearCall&, int64_t, int) { return V::set(1.0f); }

  static void prepare(const LinearCall& call, int64_t token) {
    Inputs<V> inputs(call, token);
    int8_t* to = static_cast<int8_t*>(call.values) + token * call.value_stride;
    Unit* units = call.units + token * call.unit_stride;
    alignas(64) float channels[kLinearSegment];
    const int64_t columns = call.steps * 8;
    for (int64_t k = 0; k < columns; k += kLinearSegment) {
      const int64_t left = columns - k;
      const int64_t count = left < kLinearSegment ? left : int64_t{kLinearSegment};
      inputs.take(k, count, channels);
      for (int64_t first = 0; first < count; first += call.unit, ++units) {
        const Quantizer quantizer(V::peak(channels + first, call.unit), 127.0f);
        int32_t sum = 0;
        for (int64_t i = first; i < first + call.unit; i += 8)
          sum += V::to_bytes(channels + i, quantizer.factor, to + k + i);
        *units = {quantizer.scale, static_cast<float>(sum), V::start(to + k + first, call.unit, sum)};
      }
    }
  }

 private:
  // A segment of kTiles tiles, unit by unit, for N tokens.
  template <int N, int kUnit, int kTiles, bool kZeros>
  __attribute__((noinline)) static void units(const LinearCall& call, const Segment& at, int64_t token, float* sums) {
    constexpr int kSteps = kUnit / 8;
    const int64_t tile_bytes = call.steps * kStepBytes;
    const uint8_t* weight = static_cast<const uint8_t*>(call.weight) + at.tile * tile_bytes + at.first * kStepBytes;
    const char* ahead = at.ahead;
    const int8_t* x[N];
    const Unit* u[N];
    for (int n = 0; n < N; ++n) {
      x[n] = static_cast<const int8_t*>(call.values) + (token + n) * call.value_stride + at.first * 8;
      u[n] = call.units + (token + n) * call.unit_stride + at.first / kSteps;
    }
    // Units to go in the group, which has its scales at `group`.
    const int64_t per_group = call.group_size / kUnit, tile_scales = call.groups * kLinearTile;
    int64_t left = per_group, group = at.tile * tile_scales + at.first / (call.group_size / 8) * kLinearTile;
    for (int64_t count = (at.last - at.first) / kSteps; count > 0; --count) {
      Int sum[kTiles][N][kVectors];
      for (int n = 0; n < N; ++n) {
        const Int start = kZeros ? V::zero() : V::set_int(u[n]->start);
        for (int t = 0; t < kTiles; ++t)
          for (int v = 0; v < kVectors; ++v) sum[t][n][v] = start;
      }
#pragma GCC unroll 4
      for (int q = 0; q < kSteps; ++q) {
        if (kTiles == 1) __builtin_prefetch(ahead);
        ahead += at.ahead_stride;
        for (int t = 0; t < kTiles; ++t) add_step<N>(weight + t * tile_bytes, x, q * 8, sum[t]);
        weight += kStepBytes;
      }
      keep_in_memory(sums);
      for (int t = 0; t < kTiles; ++t)
        add_unit<N, kZeros>(call, group + t * tile_scales, u, sum[t], sums + t * kTokenBlock * kLinearTile);
      for (int n = 0; n < N; ++n) {
        x[n] += kUnit;
        ++u[n];
      }
      if (--left == 0) {
        left = per_group;
        group += kLinearTile;
      }
    }
  }

  // The products of eight channels of a tile, from `channel` of x on.
  template <int N>
  static inline __attribute__((always_inline)) void add_step(const uint8_t* weight, const int8_t* const* x, int channel,
                                                             Int (*sum)[kVectors]) {
    Int codes[kVectors];
    for (int v = 0; v < kVectors; ++v) codes[v] = V::codes(weight + v * W * 4);
    for (int half = 0; half < 2; ++half) {
      Int bytes[kVectors];
      for (int v = 0; v < kVectors; ++v) bytes[v] = half == 0 ? V::low(codes[v]) : V::high(codes[v]);
      for (int n = 0; n < N; ++n) {
        const Int input = V::quad(x[n] + channel + half * 4);
        for (int v = 0; v < kVectors; ++v) sum[n][v] = V::dot_bytes(sum[n][v], bytes[v], input);
      }
    }
  }

  // A unit's sums of a tile, scaled, to `to`; the tile's scales and zero points of the unit's group are at `group`.
  template <int N, bool kZeros>
  static inline __attribute__((always_inline)) void add_unit(const LinearCall& call, int64_t group,
                                                             const Unit* const* u, const Int (*sum)[kVectors],
                                                             float* to) {
    for (int v = 0; v < kVectors; ++v) {
      const Reg scale = V::load_bfloat16(call.group_scales + group + v * W);
      const Reg zero = kZeros ? V::convert(V::widen(call.zeros + group + v * W)) : V::set(0.0f);
      for (int n = 0; n < N; ++n) {
        Reg exact = V::convert(V::bytes_sum(sum[n][v]));
        if (kZeros) exact = V::fma(zero, V::set(-u[n]->sum), exact);
        float* at = to + n * kLinearTile + v * W;
        V::store(at, V::fma(V::mul(exact, V::set(u[n]->scale)), scale, V::load(at)));
      }
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_LINEAR_INTEGER_H_
