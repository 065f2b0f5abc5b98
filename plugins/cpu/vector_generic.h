// Vector trait for any processor: four-lane vectors of the compiler's own, which become SSE2 or NEON.
#ifndef APAR_CPU_VECTOR_GENERIC_H_
#define APAR_CPU_VECTOR_GENERIC_H_

#include <stdint.h>
#include <string.h>

namespace apar {
namespace cpu {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Generic {
  using Reg = Float4;
  static constexpr int kWidth = 4;
  static constexpr int kKeyTile = 2;
  static constexpr int kDimTile = 2;

  // Casts between vectors of one size keep the bits.
  static Int4 bits(Reg x) { return (Int4)x; }
  static Reg floats(Int4 x) { return (Reg)x; }

  static Reg load(const float* p) {
    Reg x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static Reg load(const uint16_t* p) { return Reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
  static void store(float* p, Reg x) { memcpy(p, &x, sizeof x); }
  static void store(uint16_t* p, Reg x) {
    for (int i = 0; i < kWidth; ++i) p[i] = to_half(x[i]);
  }
  static Reg set(float x) { return Reg{x, x, x, x}; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  // One rounding where the baseline has the instruction, two elsewhere: scalar and vector alike.
#if defined(__FP_FAST_FMAF)
  static Reg fma(Reg a, Reg b, Reg c) {
    return Reg{fma(a[0], b[0], c[0]), fma(a[1], b[1], c[1]), fma(a[2], b[2], c[2]), fma(a[3], b[3], c[3])};
  }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static float fma(float a, float b, float c) { return a * b + c; }
#endif
  static Reg select(Int4 condition, Reg yes, Reg no) {
    return floats((condition & bits(yes)) | (~condition & bits(no)));
  }
  static Reg max(Reg a, Reg b) { return select(a > b, a, b); }
  // Adding 1.5 * 2^23 leaves no room for a fraction; right for |x| < 2^22.
  static Reg round(Reg x) {
    const Reg s = set(12582912.0f);
    return (x + s) - s;
  }
  static Reg pow2(Reg n) {
    const Reg s = set(12582912.0f);
    return floats((bits(n + s) - bits(s) + 127) << 23);
  }
  static Reg zero_below(Reg x, Reg y, float limit) { return select(y < set(limit), set(0.0f), x); }
  static float sum(Reg x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static float maximum(Reg x) {
    const float a = x[0] > x[2] ? x[0] : x[2];
    const float b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
  }

  // Rounds to nearest even; overflow becomes infinity, NaN stays NaN.
  static uint16_t to_half(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    const uint32_t sign = u >> 16 & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
    if (u < 0x38800000u) {                                                // below 2^-14: subnormal
      // 0.5f's last place is 2^-24, the half's: the addition rounds.
      float magnitude;
      memcpy(&magnitude, &u, sizeof u);
      magnitude += 0.5f;
      memcpy(&u, &magnitude, sizeof u);
      return static_cast<uint16_t>(sign | (u - 0x3f000000u));
    }
    const uint32_t odd = u >> 13 & 1u;
    return static_cast<uint16_t>(sign | ((u - 0x38000000u + 0xfffu + odd) >> 13));
  }
  static float to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t rest = h & 0x7fffu;
    uint32_t u;
    if (rest >= 0x7c00u) {
      u = sign | 0x7f800000u | rest << 13;
    } else if (rest >= 0x0400u) {
      u = sign | (rest + 0x1c000u) << 13;
    } else {
      const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
      memcpy(&u, &magnitude, sizeof u);
      u |= sign;
    }
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_VECTOR_GENERIC_H_
