// SPDX-License-Identifier: Apache-2.0
// Packed forms of values that are split into two bf16, which hold 16 bits of each: for AMX.
//
// With a = a1 + a2 and b = b1 + b2, a product is a1 b1 + a1 b2 + a2 b1; a2 b2 is below 2^-16 of it.
// An fp16 is the very sum of its two parts.
#pragma once
#include "cpu/isa/bf16_math.h"

namespace kdfast::cpu {
namespace {

// As Fp32Math. Of every 32 elements along a sum, the first 16 dwords hold the upper parts and the
// next 16 the lower parts, each as Bf16Math holds elements: so both are tile operands.
struct SplitMath {
  static constexpr int64_t kPair = 1;
  static constexpr bool kNeighbours = true;
  static constexpr int64_t kWidth = 2 * kVector;
  static constexpr int kDegree = 6;

  static Vec16 lower(Vec16 x) { return x - rounded(x, static_cast<const Bf16*>(nullptr)); }

  static void store(int32_t* row, int64_t d, Vec16 x) {
    row += d / kWidth * kWidth;
    Bf16Math::store(row, d % kWidth, x);
    Bf16Math::store(row + kVector, d % kWidth, lower(x));
  }
  static void store2(int32_t* to, Vec16 x, Vec16 y) {
    Bf16Math::store2(to, x, y);
    Bf16Math::store2(to + kVector, lower(x), lower(y));
  }
  // The lower parts go 16 rows further down.
  static void store_pairs(int32_t* to, Vec16 x, Vec16 y, int64_t step) {
    Bf16Math::store_pairs(to, x, y);
    Bf16Math::store_pairs(to + kVector * step, lower(x), lower(y));
  }
  template <class T>
  static void copy_row(const T* in, int64_t dim, int32_t* out) {
    for (int64_t d = 0; d < dim; d += kVector) store(out, d, load16(in + d, tail_mask(dim - d)));
    if (divide_up(dim, kVector) % 2) store(out, round_up(dim, kVector), zero16());
  }
  static void to_pairs(const int32_t* rows, int64_t width, int64_t count, int64_t columns,
                       int32_t* out, int64_t first = 0) {
    for (int64_t r = 0; r < count; r += 2) {
      const int64_t t = first + r;
      const int32_t* row = rows + r * width;
      int32_t* upper = out + (t / kWidth * kWidth + t % kWidth / 2) * columns;
      Bf16Math::interleave_rows(row, width, kWidth, columns, upper);
      Bf16Math::interleave_rows(row + kVector, width, kWidth, columns, upper + kVector * columns);
    }
  }
};

}  // namespace
}  // namespace kdfast::cpu
