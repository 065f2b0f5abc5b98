// How Linear's kernels cut a matrix. Internal linkage, for kernel files.
#ifndef APAR_CPU_LINEAR_SEGMENT_H_
#define APAR_CPU_LINEAR_SEGMENT_H_

#include <stdint.h>

#include "cpu/linear_kernels.h"

namespace apar {
namespace cpu {
namespace {

enum { kTokenBlock = 64 };  // tokens whose sums are held at once
enum { kMostTiles = 4 };
// Weights of a tile that all tokens go through before the next ones: these, the next ones and the inputs fit the
// first-level cache.
enum { kSegmentBytes = 8192 };

// Sums of a block of tokens, tile by tile.
typedef float Sums[kMostTiles][kTokenBlock][kLinearTile];

// A stretch of input channels of one tile or several, that all tokens go through before the next one.
struct Segment {
  int64_t tile;
  int64_t first;  // steps of the packed matrix: first .. last - 1
  int64_t last;
  // Weights to fetch meanwhile, so many bytes a step. The processor's own prefetching stops at each page, and tokens
  // that share a segment would wait for the next one's weights all at once.
  const char* ahead;
  int64_t ahead_stride;
};

}  // namespace
}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_LINEAR_SEGMENT_H_
