// What Linear's planning code and the kernels of each instruction set agree on. Plain data only: see kernels.h.
#ifndef APAR_CPU_LINEAR_KERNELS_H_
#define APAR_CPU_LINEAR_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

namespace apar {
namespace cpu {

enum { kLinearTile = 16 };  // output channels of a tile

// Input channels that are gone through for all tokens before the next ones: their weights stay in the first-level
// cache. Also the most that share one scale.
enum { kLinearSegment = 256 };

// Integer inputs: channels with one scale.
struct Unit {
  float scale;
  float sum;      // of the integers: exact, below 2^24
  int32_t start;  // where a sum of products starts, bit by bit, where there are no zero points
};

// One call. What the layouts are is in linear.h.
struct LinearCall {
  int64_t num_tokens;
  int64_t in_features;
  int64_t out_features;
  int64_t steps;   // input channels of the packed matrix (K'), divided by how many lie together
  int64_t groups;  // with scales of their own; 1: a scale for each output channel
  int32_t group_size;

  const void* weight;
  const float* channel_scales;   // null: group_scales
  const uint16_t* group_scales;  // bfloat16
  const uint8_t* zeros;          // null: 2^(bits - 1)
  const float* bias;
  const float* residual;
  float* y;

  const float* x;
  const float* norm;
  float epsilon;
  int32_t gated;

  // Inputs as the kernel reads them: float, int16 (int8 weights) or int8 (int4 weights).
  void* values;
  int64_t value_stride;
  int32_t unit;  // channels of a unit
  Unit* units;
  int64_t unit_stride;
};

struct LinearKernels {
  // Token `token` of x to `values`, normed or gated.
  void (*prepare)(const LinearCall& call, int64_t token);
  // y of the output channels of tiles first .. last - 1, for all tokens.
  void (*multiply)(const LinearCall& call, int64_t first, int64_t last);
};

// By AparLinearFormat.
enum { kLinearFormats = 5 };
struct LinearTable {
  LinearKernels formats[kLinearFormats];
};

extern const LinearTable kLinearGeneric;
#if defined(__x86_64__)
extern const LinearTable kLinearAvx2;
extern const LinearTable kLinearAvx512;
extern const LinearTable kLinearAvx512Vnni;
#endif

}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_LINEAR_KERNELS_H_
