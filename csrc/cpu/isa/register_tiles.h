// SPDX-License-Identifier: Apache-2.0
// The products that the attention kernels are written over, in vector registers.
#pragma once
#include "cpu/isa/attention_packing.h"

namespace kdfast::cpu {
namespace {

// out[r, 16 v ...] (+)= sum over s of a[r, s] * b[s, 16 v ...] for kTile rows; strides in dwords.
// Not inlined: the sums must stay in registers, and what surrounds them would push some out.
template <class M, int kW>
__attribute__((noinline)) void tile(const int32_t* a, int64_t a_row, int64_t a_step,
                                    const int32_t* b, int64_t b_step, int64_t steps, float* out,
                                    int64_t out_step, bool add) {
  Vec16 sum[kTile][kW];
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kW; ++v) sum[r][v] = zero16();
  // Two pointers and one stride reach six rows by x86 addressing.
  const int32_t* low = a;
  const int32_t* high = a + 3 * a_row;
  for (int64_t s = 0; s < steps; ++s, low += a_step, high += a_step, b += b_step) {
    Dwords16 right[kW];
#pragma GCC unroll 8
    for (int v = 0; v < kW; ++v) right[v] = load_dwords16(b + v * kVector);
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) {
      const Dwords16 left = splat_dword16(r < 3 ? low[r * a_row] : high[(r - 3) * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kW; ++v) sum[r][v] = M::multiply_add(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kW; ++v) {
      float* to = out + r * out_step + v * kVector;
      store16(to, add ? load16(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// The same for kTileWide vectors, or fewer if there are no more.
template <class M>
inline void tile(int64_t vectors, const int32_t* a, int64_t a_row, int64_t a_step, const int32_t* b,
                 int64_t b_step, int64_t steps, float* out, int64_t out_step, bool add) {
  auto f = &tile<M, 1>;
  if constexpr (kTileWide == 4)
    f = vectors >= 4   ? &tile<M, 4>
        : vectors == 3 ? &tile<M, 3>
        : vectors == 2 ? &tile<M, 2>
                       : &tile<M, 1>;
  f(a, a_row, a_step, b, b_step, steps, out, out_step, add);
}

// out (kTile rows of `columns`, out_step apart) (+)= weights x rows, both along `steps`. Chains of
// more than kChain additions are cut, to lose no more in fp32 than a matrix product does.
template <class M>
inline void weighted_rows(const int32_t* weights, int64_t w_row, int64_t w_step,
                          const int32_t* rows, int64_t columns, int64_t steps, float* out,
                          bool add) {
  constexpr int64_t kChain = 512;
  for (int64_t d = 0; d < columns; d += kTileWide * kVector)
    for (int64_t s = 0; s < steps; s += kChain)
      tile<M>((columns - d) / kVector, weights + s * w_step, w_row, w_step, rows + s * columns + d,
              columns, steps - s < kChain ? steps - s : kChain, out + d, columns, add || s > 0);
}

// Products in vector registers over the arithmetic of attention_packing.h.
template <class Math>
struct RegisterTiles : Math {
  static constexpr int64_t kRows = kTile;      // rows of a left operand that are taken at a time
  static constexpr int64_t kUnit = 1;          // dwords of a sum come in multiples of it
  static constexpr int64_t kTokens = kVector;  // rows of `pairs` come in multiples of it
  // Keys of a block of the backward: a multiple of kRows and 2.
  static constexpr int64_t kKeys = 48;
  static constexpr int64_t kKeysOfDq = kKeys;   // keys after which dq is added to
  static constexpr bool kDqTransposed = false;  // dq is summed as (D, queries)
  struct Session {};

  // out (kRows of them, columns up to kPanel) = rows x lanes; `rows` is for others.
  static void scores(const int32_t* rows, int64_t width, int64_t, const int32_t* lanes,
                     int64_t columns, int64_t steps, float* out, int64_t out_step) {
    for (int64_t c = 0; c < columns; c += kTileWide * kVector)
      tile<Math>((columns - c) / kVector, rows, width, 1, lanes + c, columns, steps, out + c,
                 out_step, false);
  }
  static void weighted(const int32_t* weights, int64_t w_row, int64_t, const int32_t* rows,
                       int64_t columns, int64_t steps, float* out, bool add) {
    weighted_rows<Math>(weights, w_row, 1, rows, columns, steps, out, add);
  }
  // The same with weights transposed: their rows are neighbours, and a step is `w_step` away.
  static void weighted_columns(const int32_t* weights, int64_t w_step, const int32_t* rows,
                               int64_t columns, int64_t steps, float* out, bool add) {
    weighted_rows<Math>(weights, 1, w_step, rows, columns, steps, out, add);
  }
  // sum over D of x[i] * y[i] for 16 rows i of `rows` and 16 lanes of `lanes`, by the very
  // additions of `scores`.
  static Vec16 diagonal(const int32_t* rows, int64_t width, const int32_t* lanes, int64_t columns,
                        int64_t steps) {
    alignas(64) int32_t turned[kVector * kVector];
    Vec16 sum = zero16();
    for (int64_t s = 0; s < steps; s += kVector) {
      transpose16(rows + s, width, turned, kVector, kVector);
      for (int64_t i = 0; i < kVector && s + i < steps; ++i)
        sum = Math::multiply_add(sum, load_dwords16(lanes + (s + i) * columns),
                                 load_dwords16(turned + i * kVector));
    }
    return sum;
  }
};

}  // namespace
}  // namespace kdfast::cpu
