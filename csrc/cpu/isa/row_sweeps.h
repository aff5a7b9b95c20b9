// SPDX-License-Identifier: Apache-2.0
// Sweeps over a row of any length, vector by vector. Like lanes.h, for every instruction set.
#pragma once
#include "cpu/isa/lanes.h"

namespace kdfast::cpu {
namespace {

// fn(i, n) for every vector of a row of `size`; n < W in the last one only. Empties the sums that
// fn adds to after every kShort vectors.
template <class A, class F, class... S>
KDFAST_INLINE void sweep(int64_t size, const F& fn, S&... sums) {
  constexpr int W = Lanes<A>::width;
  int64_t i = 0;
  for (; i + kShort * W <= size; i += kShort * W) {
    for (int64_t j = 0; j < kShort; ++j) fn(i + j * W, W);
    (sums.flush(), ...);
  }
  for (; i + W <= size; i += W) fn(i, W);
  if (i < size) fn(i, size - i);
  (sums.flush(), ...);
}

template <class A, class In>
KDFAST_INLINE typename Lanes<A>::V read(const In* p, int64_t n) {
  return n == Lanes<A>::width ? load(p) : load_some<A>(p, n, 0);
}

template <class Out, class V>
KDFAST_INLINE void write(Out* p, V v, int64_t n, bool streamed) {
  if (n != int64_t(sizeof(V) / sizeof(v[0]))) return store_some(p, v, n);
  // Streamed stores need an aligned address.
  if (streamed && reinterpret_cast<uintptr_t>(p) % kVecBytes == 0) return stream(p, v);
  store(p, v);
}

}  // namespace
}  // namespace kdfast::cpu
