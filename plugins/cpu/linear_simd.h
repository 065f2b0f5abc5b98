// Linear's kernels, written once over a vector trait V (see kernels_simd.h) that also gives:
//   div, load_bfloat16 (kWidth of them), kFloatTokens, kIntegerTokens (tokens that are multiplied at once);
//   Int, zero(), codes (kWidth * 4 bytes), convert (int32 to float);
//   bfloat16 [kWidth][2]: low and high, the two as float;
//   int4: low and high nibbles, quad (4 int8 in every lane), dot_bytes (adds products of unsigned and signed bytes;
//     at most 8 of them), bytes_sum (their int32 sums);
//   int8: even and odd bytes as int16, pair (2 int16 in every lane), dot_words (adds products of int16),
//     widen (kWidth bytes to int32), remove (sum - zero * count in int32);
//   start (what a lane of sums starts with to have 8 times the sum of these bytes removed);
//   peak (largest magnitude, as if NaN were the largest number), to_bytes and to_words (8 floats times a factor,
//     rounded, in the order that the packed codes want; return their sum).
//
// The order of sums of an output depends on nothing but its own channels: see linear.h.
#ifndef APAR_CPU_LINEAR_SIMD_H_
#define APAR_CPU_LINEAR_SIMD_H_

#include <utility>

#include "cpu/linear_float.h"
#include "cpu/linear_integer.h"
#include "cpu/linear_kernels.h"
#include "cpu/linear_segment.h"

namespace apar {
namespace cpu {
namespace {

// A block's sums to y, with the scale of their channels, bias and residual.
template <class V, class Linear>
void finish(const LinearCall& call, int64_t tile, int64_t token, int64_t count, float (*sums)[kLinearTile]) {
  constexpr int W = V::kWidth;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t row = (token + n) * call.out_features;
    for (int v = 0; v < kLinearTile / W; ++v) {
      const int64_t channel = tile * kLinearTile + v * W;
      const typename V::Reg scaled = V::mul(V::load(sums[n] + v * W), Linear::scale(call, tile, v));
      if (channel + W <= call.out_features) {
        typename V::Reg y = scaled;
        if (call.bias != nullptr) y = V::add(y, V::load(call.bias + channel));
        if (call.residual != nullptr) y = V::add(y, V::load(call.residual + row + channel));
        V::store(call.y + row + channel, y);
        continue;
      }
      float lanes[W];
      V::store(lanes, scaled);
      for (int i = 0; channel + i < call.out_features; ++i) {
        float y = lanes[i];
        if (call.bias != nullptr) y += call.bias[channel + i];
        if (call.residual != nullptr) y += call.residual[row + channel + i];
        call.y[row + channel + i] = y;
      }
    }
  }
}

typedef void (*SegmentFunction)(const LinearCall& call, const Segment& at, int64_t token, float* sums);

// By tokens - 1.
template <class Linear, int kTiles, bool kZeros, size_t... kSizes>
inline SegmentFunction segment_function(int64_t size, std::index_sequence<kSizes...>) {
  static constexpr SegmentFunction functions[] = {&Linear::template segment<kSizes + 1, kTiles, kZeros>...};
  return functions[size - 1];
}

// kTiles tiles for a block of tokens, of which at most kMost go through a segment together.
template <class V, class Linear, int kTiles, int kMost, bool kZeros>
void multiply_block(const LinearCall& call, int64_t tile, int64_t token, int64_t count, Sums& sums) {
  const int64_t groups = (count + kMost - 1) / kMost;
  const int64_t tile_bytes = call.steps * Linear::kStepBytes;
  const char* weight = static_cast<const char*>(call.weight) + tile * tile_bytes;
  for (int t = 0; t < kTiles; ++t)
    for (int64_t i = 0; i < count * kLinearTile; i += V::kWidth) V::store(sums[t][0] + i, V::set(0.0f));
  constexpr int64_t length = kSegmentBytes / Linear::kStepBytes;
  Segment at;
  at.tile = tile;
  at.ahead_stride = (Linear::kStepBytes + groups - 1) / groups;
  for (at.first = 0; at.first < call.steps; at.first = at.last) {
    at.last = at.first + length < call.steps ? at.first + length : call.steps;
    const char* next = weight + at.first * Linear::kStepBytes + kSegmentBytes;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = count * group / groups, size = count * (group + 1) / groups - first;
      at.ahead = next + (at.last - at.first) * at.ahead_stride * group;
      const SegmentFunction run = segment_function<Linear, kTiles, kZeros>(size, std::make_index_sequence<kMost>());
      run(call, at, token + first, sums[0][first]);
    }
  }
  for (int t = 0; t < kTiles; ++t) finish<V, Linear>(call, tile + t, token, count, sums[t]);
}

template <class V, class Linear, bool kZeros>
void multiply_tiles(const LinearCall& call, int64_t first, int64_t last) {
  alignas(64) Sums sums;
  for (int64_t token = 0; token < call.num_tokens; token += kTokenBlock) {
    const int64_t left = call.num_tokens - token;
    const int64_t count = left < kTokenBlock ? left : int64_t{kTokenBlock};
    int64_t tile = first;
    for (; count == 1 && tile + Linear::kTilesOfOne <= last; tile += Linear::kTilesOfOne)
      multiply_block<V, Linear, Linear::kTilesOfOne, 1, kZeros>(call, tile, token, count, sums);
    for (; count <= 2 && tile + Linear::kTilesOfTwo <= last; tile += Linear::kTilesOfTwo)
      multiply_block<V, Linear, Linear::kTilesOfTwo, 2, kZeros>(call, tile, token, count, sums);
    for (; tile < last; ++tile)
      multiply_block<V, Linear, 1, Linear::kMostTokens, kZeros>(call, tile, token, count, sums);
  }
}

template <class V, class Linear>
void multiply(const LinearCall& call, int64_t first, int64_t last) {
  if constexpr (Linear::kHasZeros)
    if (call.zeros != nullptr) return multiply_tiles<V, Linear, true>(call, first, last);
  multiply_tiles<V, Linear, false>(call, first, last);
}

template <class V, class Linear>
constexpr LinearKernels linear_kernels() {
  return {&Linear::prepare, &multiply<V, Linear>};
}

// In the order of AparLinearFormat.
template <class V>
constexpr LinearTable linear_table() {
  return {{linear_kernels<V, FloatLinear<V, Float32<V>>>(), linear_kernels<V, FloatLinear<V, Float16<V>>>(),
           linear_kernels<V, FloatLinear<V, Bfloat16<V>>>(), linear_kernels<V, Int8Linear<V>>(),
           linear_kernels<V, Int4Linear<V>>()}};
}

}  // namespace
}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_LINEAR_SIMD_H_
