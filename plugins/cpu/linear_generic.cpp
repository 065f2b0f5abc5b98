// Linear's kernels for any (little-endian) processor.
#include "cpu/linear_simd.h"
#include "cpu/vector_generic.h"

namespace apar {
namespace cpu {
namespace {

typedef uint32_t UInt4 __attribute__((vector_size(16)));

struct LinearGenericVector : Generic {
  using Int = UInt4;  // of unsigned numbers, whose overflow is defined; codes are four bytes of a channel each
  static constexpr int kFloatTokens = 2;
  static constexpr int kIntegerTokens = 2;

  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg load_bfloat16(const uint16_t* p) {
    return (Reg)(UInt4{uint32_t{p[0]} << 16, uint32_t{p[1]} << 16, uint32_t{p[2]} << 16, uint32_t{p[3]} << 16});
  }
  static Reg low_bfloat16(Int x) { return (Reg)(x << 16); }
  static Reg high_bfloat16(Int x) { return (Reg)(x & 0xffff0000u); }

  static Int zero() { return Int{}; }
  static Int set_int(int32_t x) { return Int{} + static_cast<uint32_t>(x); }
  static Int codes(const uint8_t* p) {
    Int x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static Reg convert(Int x) {
    const Int4 y = (Int4)x;
    return Reg{static_cast<float>(y[0]), static_cast<float>(y[1]), static_cast<float>(y[2]), static_cast<float>(y[3])};
  }
  static Int widen(const uint8_t* p) { return Int{p[0], p[1], p[2], p[3]}; }

  static Int low(Int x) { return x & 0x0f0f0f0fu; }
  static Int high(Int x) { return x >> 4 & 0x0f0f0f0fu; }
  static Int quad(const int8_t* p) { return Int{} + four_bytes(p); }
  static Int dot_bytes(Int sum, Int u, Int s) {
    for (int i = 0; i < 32; i += 8) sum += (u >> i & 255u) * (Int)((Int4)(s << (24 - i)) >> 24);
    return sum;
  }
  static int32_t start(const int8_t*, int64_t, int32_t sum) { return -8 * sum; }
  static Int bytes_sum(Int sum) { return sum; }

  static Int even(Int x) { return x & 0x00ff00ffu; }
  static Int odd(Int x) { return x >> 8 & 0x00ff00ffu; }
  static Int pair(const int16_t* p) { return Int{} + four_bytes(p); }
  static Int dot_words(Int sum, Int a, Int b) {
    return sum + (a & 0xffffu) * (Int)((Int4)(b << 16) >> 16) + (a >> 16) * (Int)((Int4)b >> 16);
  }
  static Int remove(Int sum, Int zero, int32_t count) { return sum - zero * static_cast<uint32_t>(count); }

  static float peak(const float* p, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = four_bytes(p + i) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    float x;
    memcpy(&x, &most, sizeof x);
    return x;
  }
  static int32_t to_words(const float* p, float factor, int16_t* to) {
    constexpr int kPlace[8] = {0, 2, 1, 3, 4, 6, 5, 7};
    int32_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += to[kPlace[i]] = static_cast<int16_t>(integer(p[i], factor));
    return sum;
  }
  static int32_t to_bytes(const float* p, float factor, int8_t* to) {
    constexpr int kPlace[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    int32_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += to[kPlace[i]] = static_cast<int8_t>(integer(p[i], factor));
    return sum;
  }

 private:
  static uint32_t four_bytes(const void* p) {
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  // A NaN becomes 0: casting it is undefined.
  static int32_t integer(float x, float factor) {
    const float product = x * factor;
    return product == product ? static_cast<int32_t>(nearbyintf(product)) : 0;
  }
};

}  // namespace

const LinearTable kLinearGeneric = linear_table<LinearGenericVector>();

}  // namespace cpu
}  // namespace apar
