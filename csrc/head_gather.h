// SPDX-License-Identifier: Apache-2.0
// Layout of head_gather, which the CPU and the CUDA build share, and index arithmetic of CUDA.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define KDFAST_HD __host__ __device__ __forceinline__
#else
#define KDFAST_HD inline
#endif

namespace kdfast {

constexpr int kMaxHeads = 512;

// The tensor seen as (outer, heads, run): a run is one head's contiguous bytes, in `unit` bytes.
struct HeadLayout {
  int64_t outer;      // product of the dimensions before `dim`
  int64_t run;        // units per head: head_dim * inner * itemsize / unit
  int32_t src_heads;  // heads in the source
  int32_t dst_heads;  // heads in the destination
  // Destination head -> source head; -1 writes zeros. By value: no device copy of indices.
  int16_t source[kMaxHeads];
};

// Source run that fills destination run `row` of (outer, dst_heads), or -1. 32 bits are faster.
template <typename Index>
KDFAST_HD Index source_run(const int16_t* source, Index row, Index src_heads, Index dst_heads) {
  const int16_t head = source[row % dst_heads];
  return head < 0 ? Index(-1) : row / dst_heads * src_heads + static_cast<Index>(head);
}

// Start (in units) of the source run that fills destination run `row` of (outer, dst_heads), or -1.
KDFAST_HD int64_t source_offset(const HeadLayout& m, int64_t row) {
  const int64_t from = source_run<int64_t>(m.source, row, m.src_heads, m.dst_heads);
  return from < 0 ? -1 : from * m.run;
}

}  // namespace kdfast
