// Linear's inputs to integers on x86: 256-bit instructions for AVX2 and AVX-512 alike. Internal linkage, for kernel
// files.
#ifndef APAR_CPU_LINEAR_X86_H_
#define APAR_CPU_LINEAR_X86_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace apar {
namespace cpu {
namespace {

struct LinearX86 {
  // Of positive floats the larger one has the larger bits, and those of a NaN are larger than infinity's.
  static float peak(const float* p, int64_t count) {
    __m256i most = _mm256_setzero_si256();
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t i = 0; i < count; i += 8) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
    }
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(x));
  }

  static int32_t to_words(const float* p, float factor, int16_t* to) {
    const __m256i rounded = integers(p, factor);
    const __m128i words = pack(rounded);
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(words, order));
    return total(rounded);
  }

  static int32_t to_bytes(const float* p, float factor, int8_t* to) {
    const __m256i rounded = integers(p, factor);
    const __m128i words = pack(rounded);
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm_packs_epi16(words, words), order));
    return total(rounded);
  }

  // -8 times the inputs that each 16 bits of a lane sum up.
  static int32_t word_start(const int8_t* p, int64_t count) {
    __m128i sum = _mm_setzero_si128();
    for (int64_t i = 0; i < count; i += 16) {
      const __m128i inputs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
      sum = _mm_sub_epi16(sum, _mm_maddubs_epi16(_mm_set1_epi8(8), inputs));
    }
    sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0xb1)));
  }

 private:
  static __m256i integers(const float* p, float factor) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p), _mm256_set1_ps(factor)));
  }

  static __m128i pack(__m256i x) {
    return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  }

  static int32_t total(__m256i x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
  }
};

inline int32_t four_bytes(const void* p) {
  int32_t x;
  memcpy(&x, p, sizeof x);
  return x;
}

}  // namespace
}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_LINEAR_X86_H_
