// SPDX-License-Identifier: Apache-2.0
// The rows of layer_norm, for whatever instruction set the including file is compiled for.
#pragma once
#include "cpu/isa/layer_norm.h"
#include "cpu/isa/row_sweeps.h"

namespace kdfast::cpu {
namespace {

// Sums side by side: one alone would wait for each addition to end before the next one.
constexpr int kSums = 4;

// A sum over a row, rounded in kSums * width chains and then in fp64.
template <class A>
struct RowSum {
  using V = typename Lanes<A>::V;
  V part[kSums] = {};

  KDFAST_INLINE double total() const { return sum((part[0] + part[1]) + (part[2] + part[3])); }
};

// fn(i, n, k) for every vector of a row of `size`, of which sum k is to take it; n < W in the last
// one only.
template <class A, class F>
KDFAST_INLINE void side_by_side(int64_t size, const F& fn) {
  constexpr int64_t W = Lanes<A>::width;
  int64_t i = 0;
  for (; i + kSums * W <= size; i += kSums * W) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) fn(i + k * W, W, k);
  }
#pragma GCC unroll 3
  for (int k = 0; k < kSums - 1; ++k) {
    if (i + W > size) break;
    fn(i, W, k);
    i += W;
  }
  if (i < size) fn(i, size - i, kSums - 1);
}

template <class In, class Weight, class A>
KDFAST_INLINE void layer_norm_row(const LayerNormArgs& a, int64_t r) {
  using V = typename Lanes<A>::V;
  constexpr int64_t W = Lanes<A>::width;
  const int64_t size = a.channels;
  const In* x = static_cast<const In*>(a.x) + r * a.stride;
  const Weight* weight = static_cast<const Weight*>(a.weight);
  const Weight* bias = static_cast<const Weight*>(a.bias);
  In* out = static_cast<In*>(a.out) + r * size;

  RowSum<A> total;
  side_by_side<A>(size, [&](int64_t i, int64_t n, int k) { total.part[k] += read<A>(x + i, n); });
  const A about = A(total.total() / size);
  // The sum was rounded, which rows of little variance would show: what is left of it is added.
  RowSum<A> left, squares;
  side_by_side<A>(size, [&](int64_t i, int64_t n, int k) {
    const V d = (n == W ? load(x + i) : load_some<A>(x + i, n, about)) - about;
    left.part[k] += d;
    squares.part[k] = fma(d, d, squares.part[k]);
  });
  const double rest = left.total() / size, variance = squares.total() / size - rest * rest;
  const A mean = A(about + rest);
  const A rstd = A(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + a.eps));
  side_by_side<A>(size, [&](int64_t i, int64_t n, int) {
    V y = (read<A>(x + i, n) - mean) * rstd;
    if (weight && bias) {
      y = fma(y, read<A>(weight + i, n), read<A>(bias + i, n));
    } else if (weight) {
      y *= read<A>(weight + i, n);
    } else if (bias) {
      y += read<A>(bias + i, n);
    }
    write(out + i, y, n, false);
  });
}

template <class In, class Weight, class A>
void layer_norm_range(const LayerNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) layer_norm_row<In, Weight, A>(a, r);
}

void layer_norm_rows(const LayerNormArgs& a, int64_t begin, int64_t end) {
  switch (a.elem) {
    case Element::f16:
      return a.wide ? layer_norm_range<Half, float, float>(a, begin, end)
                    : layer_norm_range<Half, Half, float>(a, begin, end);
    case Element::bf16:
      return a.wide ? layer_norm_range<Bf16, float, float>(a, begin, end)
                    : layer_norm_range<Bf16, Bf16, float>(a, begin, end);
    case Element::f32: return layer_norm_range<float, float, float>(a, begin, end);
    case Element::f64: return layer_norm_range<double, double, double>(a, begin, end);
  }
}

}  // namespace
}  // namespace kdfast::cpu
