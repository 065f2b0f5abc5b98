// Linear's kernels, written once over a vector trait V (see kernels_simd.h) that also gives:
//   div, load_bfloat16 (kWidth of them), kFloatTokens, kIntegerTokens (tokens that are multiplied at once);
//   Int, zero(), codes (kWidth * 4 bytes), convert (int32 to float);
//   bfloat16 [kWidth][2]: low and high, the two as float;
//   int4: low and high nibbles, quad (4 int8 in every lane), dot_bytes (adds products of unsigned and signed bytes;
//     at most 8 of them), bytes_sum (their int32 sums);
//   int8: even and odd bytes as int16, pair (2 int16 in every lane), dot_words (adds products of int16),
//     widen (kWidth bytes to int32), remove (sum - zero * count in int32);
//   peak (largest magnitude, as if NaN were the largest number), to_bytes and to_words (8 floats times a factor,
//     rounded, in the order that the packed codes want; return their sum).
//
// The order of sums of an output depends on nothing but its own channels: see linear.h.
#ifndef APAR_CPU_LINEAR_SIMD_H_
#define APAR_CPU_LINEAR_SIMD_H_

#include <math.h>
#include <string.h>

#include "cpu/linear_inputs.h"
#include "cpu/linear_kernels.h"

namespace apar {
namespace cpu {
namespace {

enum { kTokenBlock = 64 };  // tokens whose sums are held at once
enum { kMostTiles = 4 };

// Sums of a block of tokens, tile by tile.
typedef float Sums[kMostTiles][kTokenBlock][kLinearTile];

// ------------------------------------------------------------------ float formats

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
  static constexpr int kMostTokens = V::kFloatTokens;

  // Steps first .. last - 1 of kTiles tiles, `tile_size` elements apart, for N tokens.
  template <int N, int kTiles>
  static void segment(const LinearCall& call, const Element* weight, int64_t tile_size, int64_t token, int64_t first,
                      int64_t last, Sums& sums, int64_t at) {
    Reg sum[N][kTiles * kVectors];
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < kTiles * kVectors; ++v) sum[n][v] = V::set(0.0f);
    const float* x[N];
    for (int n = 0; n < N; ++n) x[n] = static_cast<const float*>(call.values) + (token + n) * call.value_stride;
    for (int64_t k = first; k < last; ++k) {
      const Element* w = weight + k * kLinearTile * kTogether;
      for (int i = 0; i < kTogether; ++i) {
        // One weight vector at a time: registers are few.
        Reg input[N];
        for (int n = 0; n < N; ++n) input[n] = V::set(x[n][k * kTogether + i]);
        for (int t = 0; t < kTiles; ++t)
          for (int v = 0; v < kVectors; ++v) {
            const Reg value = F::load(w + t * tile_size + v * W * kTogether, i);
            for (int n = 0; n < N; ++n)
              sum[n][t * kVectors + v] = V::fma(input[n], value, sum[n][t * kVectors + v]);
          }
      }
    }
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < kTiles * kVectors; ++v) {
        float* to = sums[v / kVectors][at + n] + v % kVectors * W;
        V::store(to, V::fma(sum[n][v], V::set(1.0f), V::load(to)));
      }
  }

  template <int kTiles>
  static void multiply(const LinearCall& call, int64_t tile, int64_t token, int64_t count, Sums& sums) {
    const int64_t tile_size = call.steps * kLinearTile * kTogether;
    const Element* weight = static_cast<const Element*>(call.weight) + tile * tile_size;
    const int64_t length = kLinearSegment / kTogether;
    for (int64_t first = 0; first < call.steps; first += length) {
      const int64_t last = first + length < call.steps ? first + length : call.steps;
      each_group<(kMostTokens > kTiles ? kMostTokens / kTiles : 1)>(count, [&](auto size, int64_t at) {
        segment<decltype(size)::value, kTiles>(call, weight, tile_size, token + at, first, last, sums, at);
      });
    }
  }

  // Few tokens leave registers for several tiles, and need them: each sum waits for its last addition.
  static int64_t multiply(const LinearCall& call, int64_t tile, int64_t tiles, int64_t token, int64_t count,
                          Sums& sums) {
    if (tiles >= 4 && count == 1) return multiply<4>(call, tile, token, count, sums), 4;
    if (tiles >= 2 && count <= 2) return multiply<2>(call, tile, token, count, sums), 2;
    return multiply<1>(call, tile, token, count, sums), 1;
  }

  static Reg scale(const LinearCall&, int64_t, int) { return V::set(1.0f); }

  static void prepare(const LinearCall& call, int64_t token) {
    Inputs<V> inputs(call, token);
    float* to = static_cast<float*>(call.values) + token * call.value_stride;
    for (int64_t k = 0; k < call.value_stride; k += kLinearSegment) {
      const int64_t left = call.value_stride - k;
      inputs.take(k, left < kLinearSegment ? left : int64_t{kLinearSegment}, to + k);
    }
  }
};

// ------------------------------------------------------------------ int8

template <class V>
struct Int8Linear {
  using Reg = typename V::Reg;
  using Int = typename V::Int;
  static constexpr int W = V::kWidth, kVectors = kLinearTile / W;
  static constexpr int kMostTokens = V::kIntegerTokens;

  // One unit of channels for N tokens.
  template <int N>
  static void segment(const LinearCall& call, const uint8_t* weight, int64_t tile, int64_t token, int64_t unit,
                      int64_t quads, Sums& sums, int64_t at) {
    Int sum[N][kVectors];
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < kVectors; ++v) sum[n][v] = V::zero();
    const int16_t* x[N];
    for (int n = 0; n < N; ++n)
      x[n] = static_cast<const int16_t*>(call.values) + (token + n) * call.value_stride + unit * call.unit;
    for (int64_t q = 0; q < quads; ++q) {
      Int codes[kVectors];
      for (int v = 0; v < kVectors; ++v) codes[v] = V::codes(weight + (q * kLinearTile + v * W) * 4);
      for (int i = 0; i < 2; ++i) {
        Int words[kVectors];
        for (int v = 0; v < kVectors; ++v) words[v] = i == 0 ? V::even(codes[v]) : V::odd(codes[v]);
        for (int n = 0; n < N; ++n) {
          const Int input = V::pair(x[n] + q * 4 + i * 2);
          for (int v = 0; v < kVectors; ++v) sum[n][v] = V::dot_words(sum[n][v], words[v], input);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t group = (tile * call.groups + (call.groups > 1 ? unit : 0)) * kLinearTile + v * W;
      const Int zero = call.zeros != nullptr ? V::widen(call.zeros + group) : V::set_int(128);
      const Reg scale = call.group_scales != nullptr ? V::load_bfloat16(call.group_scales + group) : V::set(1.0f);
      for (int n = 0; n < N; ++n) {
        const Unit& u = call.units[(token + n) * call.unit_stride + unit];
        const Reg part = V::convert(V::remove(sum[n][v], zero, static_cast<int32_t>(u.sum)));
        float* to = sums[0][at + n] + v * W;
        V::store(to, V::fma(V::mul(part, V::set(u.scale)), scale, V::load(to)));
      }
    }
  }

  static int64_t multiply(const LinearCall& call, int64_t tile, int64_t, int64_t token, int64_t count, Sums& sums) {
    const uint8_t* weight = static_cast<const uint8_t*>(call.weight) + tile * call.steps * kLinearTile * 4;
    const int64_t length = call.unit / 4;
    for (int64_t first = 0, unit = 0; first < call.steps; first += length, ++unit) {
      const int64_t quads = first + length < call.steps ? length : call.steps - first;
      each_group<kMostTokens>(count, [&](auto size, int64_t at) {
        segment<decltype(size)::value>(call, weight + first * kLinearTile * 4, tile, token + at, unit, quads, sums,
                                       at);
      });
    }
    return 1;
  }

  static Reg scale(const LinearCall& call, int64_t tile, int v) {
    return call.channel_scales != nullptr ? V::load(call.channel_scales + tile * kLinearTile + v * W) : V::set(1.0f);
  }

  static void prepare(const LinearCall& call, int64_t token) {
    Inputs<V> inputs(call, token);
    int16_t* to = static_cast<int16_t*>(call.values) + token * call.value_stride;
    Unit* units = call.units + token * call.unit_stride;
    for (int64_t k = 0; k < call.value_stride; k += call.unit, ++units) {
      alignas(64) float channels[kLinearSegment];
      const int64_t left = call.value_stride - k;
      const int64_t count = left < call.unit ? left : call.unit;
      inputs.take(k, count, channels);
      const Quantizer quantizer(V::peak(channels, count), 32767.0f);
      int32_t sum = 0;
      for (int64_t i = 0; i < count; i += 8) sum += V::to_words(channels + i, quantizer.factor, to + k + i);
      *units = {quantizer.scale, static_cast<float>(sum)};
    }
  }
};

// ------------------------------------------------------------------ int4

template <class V>
struct Int4Linear {
  using Reg = typename V::Reg;
  using Int = typename V::Int;
  static constexpr int W = V::kWidth, kVectors = kLinearTile / W;
  static constexpr int kMostTokens = V::kIntegerTokens;

  // Groups first .. last - 1 for N tokens; a group has `units` units of kUnit channels, one where kSingle.
  template <int N, int kUnit, bool kSingle>
  static void segment(const LinearCall& call, const uint8_t* weight, int64_t tile, int64_t token, int64_t first,
                      int64_t last, int64_t units, Sums& sums, int64_t at) {
    const int8_t* x[N];
    const Unit* u[N];
    for (int n = 0; n < N; ++n) {
      x[n] = static_cast<const int8_t*>(call.values) + (token + n) * call.value_stride + first * units * kUnit;
      u[n] = call.units + (token + n) * call.unit_stride + first * units;
    }
    weight += first * units * kUnit / 8 * kLinearTile * 4;
    for (int64_t g = first; g < last; ++g) {
      Reg part[N][kVectors];
      if (!kSingle)
        for (int n = 0; n < N; ++n)
          for (int v = 0; v < kVectors; ++v) part[n][v] = V::set(0.0f);
      const int64_t group = (tile * call.groups + g) * kLinearTile;
      Reg zero[kVectors];
      for (int v = 0; v < kVectors; ++v)
        zero[v] = call.zeros != nullptr ? V::convert(V::widen(call.zeros + group + v * W)) : V::set(8.0f);
      for (int64_t i = 0; i < (kSingle ? 1 : units); ++i) {
        Int sum[N][kVectors];
        for (int n = 0; n < N; ++n)
          for (int v = 0; v < kVectors; ++v) sum[n][v] = V::zero();
        for (int q = 0; q < kUnit / 8; ++q) {
          Int codes[kVectors];
          for (int v = 0; v < kVectors; ++v) codes[v] = V::codes(weight + (q * kLinearTile + v * W) * 4);
          for (int half = 0; half < 2; ++half) {
            Int bytes[kVectors];
            for (int v = 0; v < kVectors; ++v) bytes[v] = half == 0 ? V::low(codes[v]) : V::high(codes[v]);
            for (int n = 0; n < N; ++n) {
              const Int input = V::quad(x[n] + q * 8 + half * 4);
              for (int v = 0; v < kVectors; ++v) sum[n][v] = V::dot_bytes(sum[n][v], bytes[v], input);
            }
          }
        }
        weight += kUnit / 8 * kLinearTile * 4;
        for (int n = 0; n < N; ++n) {
          const Reg scale = V::set(u[n]->scale), minus = V::set(-u[n]->sum);
          for (int v = 0; v < kVectors; ++v) {
            const Reg exact = V::fma(zero[v], minus, V::convert(V::bytes_sum(sum[n][v])));
            part[n][v] = kSingle ? V::mul(exact, scale) : V::fma(exact, scale, part[n][v]);
          }
          x[n] += kUnit;
          ++u[n];
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        const Reg scale = V::load_bfloat16(call.group_scales + group + v * W);
        for (int n = 0; n < N; ++n) {
          float* to = sums[0][at + n] + v * W;
          V::store(to, V::fma(part[n][v], scale, V::load(to)));
        }
      }
    }
  }

  static int64_t multiply(const LinearCall& call, int64_t tile, int64_t, int64_t token, int64_t count, Sums& sums) {
    const uint8_t* weight = static_cast<const uint8_t*>(call.weight) + tile * call.steps * kLinearTile * 4;
    const int64_t length = kLinearSegment / call.group_size;
    for (int64_t first = 0; first < call.groups; first += length) {
      const int64_t last = first + length < call.groups ? first + length : call.groups;
      each_group<kMostTokens>(count, [&](auto size, int64_t at) {
        constexpr int N = decltype(size)::value;
        if (call.unit == 16) {
          segment<N, 16, true>(call, weight, tile, token + at, first, last, 1, sums, at);
        } else if (call.group_size == 32) {
          segment<N, 32, true>(call, weight, tile, token + at, first, last, 1, sums, at);
        } else {
          segment<N, 32, false>(call, weight, tile, token + at, first, last, call.group_size / 32, sums, at);
        }
      });
    }
    return 1;
  }

  static Reg scale(const LinearCall&, int64_t, int) { return V::set(1.0f); }

  static void prepare(const LinearCall& call, int64_t token) {
    Inputs<V> inputs(call, token);
    int8_t* to = static_cast<int8_t*>(call.values) + token * call.value_stride;
    Unit* units = call.units + token * call.unit_stride;
    alignas(64) float channels[kLinearSegment];
    for (int64_t k = 0; k < call.value_stride; k += kLinearSegment) {
      const int64_t left = call.value_stride - k;
      const int64_t count = left < kLinearSegment ? left : int64_t{kLinearSegment};
      inputs.take(k, count, channels);
      for (int64_t first = 0; first < count; first += call.unit, ++units) {
        const Quantizer quantizer(V::peak(channels + first, call.unit), 127.0f);
        int32_t sum = 0;
        for (int64_t i = first; i < first + call.unit; i += 8)
          sum += V::to_bytes(channels + i, quantizer.factor, to + k + i);
        *units = {quantizer.scale, static_cast<float>(sum)};
      }
    }
  }
};

// ------------------------------------------------------------------ all

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

template <class V, class Linear>
void multiply_tiles(const LinearCall& call, int64_t first, int64_t last) {
  alignas(64) Sums sums;
  for (int64_t token = 0; token < call.num_tokens; token += kTokenBlock) {
    const int64_t left = call.num_tokens - token;
    const int64_t count = left < kTokenBlock ? left : int64_t{kTokenBlock};
    for (int64_t tile = first; tile < last;) {
      for (auto& tile_sums : sums) memset(tile_sums, 0, sizeof(float) * count * kLinearTile);
      const int64_t done = Linear::multiply(call, tile, last - tile, token, count, sums);
      for (int64_t i = 0; i < done; ++i) finish<V, Linear>(call, tile + i, token, count, sums[i]);
      tile += done;
    }
  }
}

template <class V, class Linear>
constexpr LinearKernels linear_kernels() {
  return {&Linear::prepare, &multiply_tiles<V, Linear>};
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
