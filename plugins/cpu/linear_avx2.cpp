// Linear's kernels for AVX2 with FMA and F16C.
#include "cpu/linear_simd.h"
#include "cpu/linear_x86.h"
#include "cpu/vector_avx2.h"

namespace apar {
namespace cpu {
namespace {

struct LinearAvx2Vector : Avx2, LinearX86 {
  using Int = __m256i;
  static constexpr int kFloatTokens = 4;
  static constexpr int kIntegerTokens = 5;

  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg load_bfloat16(const uint16_t* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  static Reg low_bfloat16(Int x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
  static Reg high_bfloat16(Int x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  static Int zero() { return _mm256_setzero_si256(); }
  static Int set_int(int32_t x) { return _mm256_set1_epi32(x); }
  static Int codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Reg convert(Int x) { return _mm256_cvtepi32_ps(x); }
  static Int widen(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }

  static Int low(Int x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static Int high(Int x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
  static Int quad(const int8_t* p) { return _mm256_set1_epi32(four_bytes(p)); }
  // Eight sums of two products of at most 15 * 128 fit 16 bits.
  static Int dot_bytes(Int sum, Int u, Int s) { return now(_mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s))); }
  static int32_t start(const int8_t* p, int64_t count, int32_t) { return word_start(p, count); }
  static Int bytes_sum(Int sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

  static Int even(Int x) { return _mm256_and_si256(x, _mm256_set1_epi16(255)); }
  static Int odd(Int x) { return _mm256_srli_epi16(x, 8); }
  static Int pair(const int16_t* p) { return _mm256_set1_epi32(four_bytes(p)); }
  static Int dot_words(Int sum, Int a, Int b) { return now(_mm256_add_epi32(sum, _mm256_madd_epi16(a, b))); }
  static Int remove(Int sum, Int zero, int32_t count) {
    return _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, _mm256_set1_epi32(count)));
  }

 private:
  // Adds now: left alone, GCC multiplies everything first and runs out of registers.
  static Int now(Int sum) {
    __asm__("" : "+x"(sum));
    return sum;
  }
};

}  // namespace

const LinearTable kLinearAvx2 = linear_table<LinearAvx2Vector>();

}  // namespace cpu
}  // namespace apar
