// Linear's kernels for AVX-512 F, BW, VL, DQ.
#include "cpu/linear_vector_avx512.h"

namespace apar {
namespace cpu {
namespace {

struct LinearAvx512Bw : LinearAvx512Vector {
  // Eight sums of two products of at most 15 * 128 fit 16 bits.
  static Int dot_bytes(Int sum, Int u, Int s) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(u, s)); }
  static int32_t start(const int8_t* p, int64_t count, int32_t) { return word_start(p, count); }
  static Int bytes_sum(Int sum) { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
  static Int dot_words(Int sum, Int a, Int b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
};

}  // namespace

const LinearTable kLinearAvx512 = linear_table<LinearAvx512Bw>();

}  // namespace cpu
}  // namespace apar
