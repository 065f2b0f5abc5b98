// Linear's kernels for AVX-512 with VNNI: integer products and their sums in one instruction.
#include "cpu/linear_vector_avx512.h"

namespace apar {
namespace cpu {
namespace {

struct LinearAvx512Vnni : LinearAvx512Vector {
  static Int dot_bytes(Int sum, Int u, Int s) { return _mm512_dpbusd_epi32(sum, u, s); }
  static int32_t start(const int8_t*, int64_t, int32_t sum) { return -8 * sum; }
  static Int bytes_sum(Int sum) { return sum; }
  static Int dot_words(Int sum, Int a, Int b) { return _mm512_dpwssd_epi32(sum, a, b); }
};

}  // namespace

const LinearTable kLinearAvx512Vnni = linear_table<LinearAvx512Vnni>();

}  // namespace cpu
}  // namespace apar
