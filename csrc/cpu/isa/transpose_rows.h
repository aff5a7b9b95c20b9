// SPDX-License-Identifier: Apache-2.0
// Transposes strips of columns, for whatever instruction set the including file is compiled for.
#pragma once
#include "cpu/isa/transpose.h"
#include "cpu/isa/vec16.h"

namespace kdfast::cpu {
namespace {

// Blocks of 16 rows whose sums are added up in fp32 before they go to fp64.
constexpr int64_t kTransposeBlocks = 16;

// Columns [first, first + count) of a, count up to kTransposeStrip.
inline void transpose_strip(const TransposeArgs& a, int64_t first, int64_t count) {
  double total[kTransposeStrip] = {};
  const int64_t whole = a.rows / kVector * kVector;
  for (int64_t from = 0; from < whole; from += kTransposeBlocks * kVector) {
    const int64_t to =
        from + kTransposeBlocks * kVector < whole ? from + kTransposeBlocks * kVector : whole;
    for (int64_t r = from; r < to; r += kVector) {
      for (int64_t c = 0; c + kVector <= count; c += kVector) {
        transpose16(reinterpret_cast<const int32_t*>(a.x + r * a.stride + first + c), a.stride,
                    reinterpret_cast<int32_t*>(a.out + (first + c) * a.rows + r), a.rows, kVector);
      }
    }
    for (int64_t c = count / kVector * kVector; c < count; ++c) {
      for (int64_t r = from; r < to; ++r)
        a.out[(first + c) * a.rows + r] = a.x[r * a.stride + first + c];
    }
    if (a.sums == nullptr) continue;
    for (int64_t c = 0; c < count; ++c) {  // what was written is still in cache
      Vec16 part = zero16();
      for (int64_t r = from; r < to; r += kVector)
        part = part + load16(a.out + (first + c) * a.rows + r);
      total[c] += sum16(part);
    }
  }
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t r = whole; r < a.rows; ++r) {
      const float value = a.x[r * a.stride + first + c];
      a.out[(first + c) * a.rows + r] = value;
      total[c] += value;
    }
    if (a.sums != nullptr) a.sums[first + c] = static_cast<float>(total[c]);
  }
}

void transpose_rows(const TransposeArgs& a, int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t first = strip * kTransposeStrip, left = a.columns - first;
    transpose_strip(a, first, left < kTransposeStrip ? left : kTransposeStrip);
  }
}

}  // namespace
}  // namespace kdfast::cpu
