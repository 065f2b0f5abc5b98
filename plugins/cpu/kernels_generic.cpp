// Kernels for any processor: four-lane vectors of the compiler's own, which become SSE2 or NEON.
#include "cpu/kernels_simd.h"
#include "cpu/vector_generic.h"

namespace apar {
namespace cpu {

const Kernels kGenericKernels = APAR_KERNELS("generic", Generic);

}  // namespace cpu
}  // namespace apar
