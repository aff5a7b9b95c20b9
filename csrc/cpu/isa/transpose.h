// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace kdfast::cpu {

// A matrix of fp32 and where its transpose and the sums of its columns go.
struct TransposeArgs {
  const float* x;  // (rows, columns), contiguous rows `stride` apart
  float* out;      // (columns, rows) contiguous
  float* sums;     // (columns), or null
  int64_t rows, columns, stride;
};

// Columns of a strip: four cache lines of a row, which the processor fetches together.
constexpr int64_t kTransposeStrip = 64;

}  // namespace kdfast::cpu
