// SPDX-License-Identifier: Apache-2.0
// The products that the AVX-512 attention kernels are written over, in vector registers.
#pragma once
#include "cpu/isa/avx512_tiles.h"

namespace kdfast::cpu {
namespace {

// Products in vector registers over the arithmetic of avx512_tiles.h.
template <class Math>
struct RegisterTiles : Math {
  static constexpr int64_t kRows = kTile;      // rows of a left operand that are taken at a time
  static constexpr int64_t kUnit = 1;          // dwords of a sum come in multiples of it
  static constexpr int64_t kTokens = kVector;  // rows of `pairs` come in multiples of it
  static constexpr int64_t kKeys =
      48;  // keys of a block of the backward: a multiple of kRows and 2
  static constexpr int64_t kKeysOfDq = kKeys;   // keys after which dq is added to
  static constexpr bool kDqTransposed = false;  // dq is summed as (D, queries)
  struct Session {};

  // out (kRows of them, columns up to kPanel) = rows x lanes; `rows` is for others.
  static void scores(const int32_t* rows, int64_t width, int64_t, const int32_t* lanes,
                     int64_t columns, int64_t steps, float* out, int64_t out_step) {
    tile<Math>(columns / kVector, rows, width, 1, lanes, columns, steps, out, out_step, false);
  }
  static void weighted(const int32_t* weights, int64_t w_row, int64_t, const int32_t* rows,
                       int64_t columns, int64_t steps, float* out, bool add) {
    weighted_rows<Math>(weights, w_row, 1, rows, columns, steps, out, add);
  }
  // sum over D of x[i] * y[i] for 16 rows i of `rows` and 16 lanes of `lanes`, by the very
  // additions of `scores`.
  static __m512 diagonal(const int32_t* rows, int64_t width, const int32_t* lanes, int64_t columns,
                         int64_t steps) {
    alignas(64) int32_t turned[kVector * kVector];
    __m512 sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; s += kVector) {
      transpose16(rows + s, width, turned, kVector, kVector);
      for (int64_t i = 0; i < kVector && s + i < steps; ++i)
        sum = Math::multiply_add(sum, _mm512_loadu_si512(lanes + (s + i) * columns),
                                 _mm512_loadu_si512(turned + i * kVector));
    }
    return sum;
  }
};

}  // namespace
}  // namespace kdfast::cpu
