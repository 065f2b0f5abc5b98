// Kernels for AVX-512 F, BW, VL, DQ (Skylake-SP, Zen 4 on).
#include "cpu/kernels_simd.h"
#include "cpu/vector_avx512.h"

namespace apar {
namespace cpu {

const Kernels kAvx512Kernels = APAR_KERNELS("avx512", Avx512);

}  // namespace cpu
}  // namespace apar
