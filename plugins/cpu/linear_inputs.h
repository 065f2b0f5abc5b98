// A token's inputs of Linear as they come to its kernels: normed, gated, in integers. Internal linkage, for kernel
// files.
#ifndef APAR_CPU_LINEAR_INPUTS_H_
#define APAR_CPU_LINEAR_INPUTS_H_

#include <math.h>
#include <string.h>

#include "cpu/linear_kernels.h"
#include "cpu/vector_math.h"

namespace apar {
namespace cpu {
namespace {

// How numbers up to `peak` become integers up to `levels`. Where there is a NaN or an infinity, the scale is NaN
// and so is everything that is multiplied by it.
struct Quantizer {
  float factor;
  float scale;

  Quantizer(float peak, float levels) {
    const bool finite = peak < INFINITY;
    // What is smaller counts as nothing: its inverse would overflow.
    const bool some = finite && peak > 1e-30f;
    factor = some ? levels / peak : 0.0f;
    scale = finite ? (some ? peak / levels : 0.0f) : NAN;
  }
};

template <class V>
class Inputs {
 public:
  Inputs(const LinearCall& call, int64_t token)
      : call_(call), x_(call.x + token * call.in_features * (call.gated ? 2 : 1)) {
    if (call.norm != nullptr) factor_ = inverse_root(x_, call.in_features, call.epsilon);
  }

  // Channels first .. first + count - 1; zeros beyond the last channel.
  void take(int64_t first, int64_t count, float* to) const {
    const int64_t there = first + count <= call_.in_features ? count : call_.in_features - first;
    const float* x = x_ + first;
    int64_t k = 0;
    if (call_.gated) {
      const float* up = x + call_.in_features;
      for (; k + W <= there; k += W) V::store(to + k, gate(V::load(x + k), V::load(up + k)));
      if (k < there) {
        float lanes[2][W] = {};
        for (int64_t i = k; i < there; ++i) {
          lanes[0][i - k] = x[i];
          lanes[1][i - k] = up[i];
        }
        V::store(lanes[0], gate(V::load(lanes[0]), V::load(lanes[1])));
        for (; k < there; ++k) to[k] = lanes[0][k % W];
      }
    } else if (call_.norm != nullptr) {
      const float* norm = call_.norm + first;
      const Reg factor = V::set(factor_);
      for (; k + W <= there; k += W) V::store(to + k, V::mul(V::mul(V::load(x + k), factor), V::load(norm + k)));
      for (; k < there; ++k) to[k] = x[k] * factor_ * norm[k];
    } else {
      memcpy(to, x, sizeof(float) * there);
    }
    memset(to + there, 0, sizeof(float) * (count - there));
  }

 private:
  using Reg = typename V::Reg;
  static constexpr int W = V::kWidth;

  // silu(g) u = g u / (1 + e^-g)
  static Reg gate(Reg g, Reg u) {
    const Reg power = V::mul(V::max(V::set(-126.0f), V::mul(g, V::set(1.44269504f))), V::set(-1.0f));
    return V::div(V::mul(g, u), V::add(V::set(1.0f), exp2_of<V>(power)));
  }

  static float inverse_root(const float* x, int64_t count, float epsilon) {
    Reg sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = V::set(0.0f);
    int64_t k = 0;
    for (; k + 4 * W <= count; k += 4 * W)
      for (int i = 0; i < 4; ++i) {
        const Reg value = V::load(x + k + i * W);
        sum[i] = V::fma(value, value, sum[i]);
      }
    float total = V::sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
    for (; k < count; ++k) total = V::fma(x[k], x[k], total);
    return 1.0f / sqrtf(total / static_cast<float>(count) + epsilon);
  }

  const LinearCall& call_;
  const float* x_;
  float factor_ = 1.0f;
};

}  // namespace
}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_LINEAR_INPUTS_H_
