// Functions over a vector trait (see kernels_simd.h); internal linkage, for kernel files.
#ifndef APAR_CPU_VECTOR_MATH_H_
#define APAR_CPU_VECTOR_MATH_H_

namespace apar {
namespace cpu {
namespace {

// 2^x for x <= 127; 0 below -126; NaN stays NaN.
template <class V>
inline typename V::Reg exp2_of(typename V::Reg x) {
  using Reg = typename V::Reg;
  // 2^x = 2^n 2^f with n = round(x), |f| <= 1/2; 2^f by its Taylor series, error below 1e-8.
  const Reg bounded = V::max(V::set(-126.0f), x);
  const Reg n = V::round(bounded);
  const Reg f = V::fma(n, V::set(-1.0f), bounded);
  Reg y = V::set(1.5252734e-5f);
  y = V::fma(y, f, V::set(1.5403531e-4f));
  y = V::fma(y, f, V::set(1.3333558e-3f));
  y = V::fma(y, f, V::set(9.6181291e-3f));
  y = V::fma(y, f, V::set(5.5504109e-2f));
  y = V::fma(y, f, V::set(2.4022651e-1f));
  y = V::fma(y, f, V::set(6.9314718e-1f));
  y = V::fma(y, f, V::set(1.0f));
  return V::zero_below(V::mul(y, V::pow2(n)), x, -126.0f);
}

}  // namespace
}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_VECTOR_MATH_H_
