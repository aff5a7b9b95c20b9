// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <utility>

#include "cpu/isa/peak.h"

namespace kdfast::cpu {
namespace {

template <class V, class Ones, class F, int... i>
inline double vector_peak(Ones ones, const F& step, std::integer_sequence<int, i...>) {
  // Read anew for each sum: of sums that are known to be equal the compiler would keep one.
  const volatile float zero = 0;
  V sums[] = {(static_cast<void>(i), zero - V{})...};
  // Indices that are constants, not a loop: then all sums are kept in registers.
  for (int64_t s = 0; s < 16384; ++s) (step(sums[i], ones), ...);
  const V total = (sums[i] + ...);
  double count = 0;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(float); ++lane) count += total[lane];
  return count;
}

// kSums multiply-adds of vectors over and over, enough of them to hide the latency of each.
// step(sum, ones) does one; V is a vector of fp32.
template <int kSums, class V, class Ones, class F>
inline double vector_peak(Ones ones, const F& step) {
  return vector_peak<V>(ones, step, std::make_integer_sequence<int, kSums>());
}

}  // namespace
}  // namespace kdfast::cpu
