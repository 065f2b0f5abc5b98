// Kernels for AVX2 with FMA and F16C (2013 on).
#include "cpu/kernels_simd.h"
#include "cpu/vector_avx2.h"

namespace apar {
namespace cpu {

const Kernels kAvx2Kernels = APAR_KERNELS("avx2", Avx2);

}  // namespace cpu
}  // namespace apar
