// Linear's vector trait for AVX-512 F, BW, VL, DQ. Internal linkage, for kernel files.
#ifndef APAR_CPU_LINEAR_VECTOR_AVX512_H_
#define APAR_CPU_LINEAR_VECTOR_AVX512_H_

#include "cpu/vector_avx512.h"
// The warnings that it turns off are those of what follows, too.
#include "cpu/linear_simd.h"
#include "cpu/linear_x86.h"

namespace apar {
namespace cpu {
namespace {

struct LinearAvx512Vector : Avx512, LinearX86 {
  using Int = __m512i;
  static constexpr int kFloatTokens = 8;
  static constexpr int kIntegerTokens = 8;

  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg load_bfloat16(const uint16_t* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  static Reg low_bfloat16(Int x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
  static Reg high_bfloat16(Int x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  static Int zero() { return _mm512_setzero_si512(); }
  static Int set_int(int32_t x) { return _mm512_set1_epi32(x); }
  static Int codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Reg convert(Int x) { return _mm512_cvtepi32_ps(x); }
  static Int widen(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  static Int low(Int x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static Int high(Int x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
  static Int quad(const int8_t* p) { return _mm512_set1_epi32(four_bytes(p)); }
  static Int even(Int x) { return _mm512_and_si512(x, _mm512_set1_epi16(255)); }
  static Int odd(Int x) { return _mm512_srli_epi16(x, 8); }
  static Int pair(const int16_t* p) { return _mm512_set1_epi32(four_bytes(p)); }
  static Int remove(Int sum, Int zero, int32_t count) {
    return _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(count)));
  }
};

}  // namespace
}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_LINEAR_VECTOR_AVX512_H_
