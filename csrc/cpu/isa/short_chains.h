// SPDX-License-Identifier: Apache-2.0
// Products of fp32 in vector registers, of which those of upstream gradients and values are summed
// in short chains.
#pragma once
#include "cpu/isa/register_tiles.h"

namespace kdfast::cpu {
namespace {

// Where P is nearly a single 1, dS is the small difference of dP and delta, each a sum over D whose
// rounding would show. Both take the same additions, so that it is exactly zero where P is a 1.
struct ShortChains : RegisterTiles<Fp32Math> {
  static constexpr int64_t kChain = 8;

  static int64_t chain(int64_t steps, int64_t s) { return steps - s < kChain ? steps - s : kChain; }

  static void short_scores(const int32_t* rows, int64_t width, const int32_t* lanes,
                           int64_t columns, int64_t steps, float* out, int64_t out_step) {
    for (int64_t s = 0; s < steps; s += kChain)
      for (int64_t c = 0; c < columns; c += kTileWide * kVector)
        tile<Fp32Math>((columns - c) / kVector, rows + s, width, 1, lanes + s * columns + c,
                       columns, chain(steps, s), out + c, out_step, s > 0);
  }
  static Vec16 diagonal(const int32_t* rows, int64_t width, const int32_t* lanes, int64_t columns,
                        int64_t steps) {
    using Base = RegisterTiles<Fp32Math>;
    Vec16 sum = Base::diagonal(rows, width, lanes, columns, chain(steps, 0));
    for (int64_t s = kChain; s < steps; s += kChain)
      sum = sum + Base::diagonal(rows + s, width, lanes + s * columns, columns, chain(steps, s));
    return sum;
  }
};

}  // namespace
}  // namespace kdfast::cpu
