// SPDX-License-Identifier: Apache-2.0
// The rows of swiglu_norm, for whatever instruction set the including file is compiled for.
// A row comes from memory once; what the next sweep over it needs stays in cache.
// Formulas: docs/ops/swiglu_norm.md.
#pragma once
#include "cpu/isa/row_sweeps.h"
#include "cpu/isa/swiglu_norm.h"

namespace kdfast::cpu {
namespace {

template <class V>
KDFAST_INLINE V sigmoid(V x) {
  // Of -|x|, which cannot overflow: sigmoid is 1 / (1 + e) for x >= 0, else e / (1 + e).
  const V one = V{} + 1.0f, e = exp_negative(x > 0 ? -x : x);
  return (x > 0 ? one : e) / (e + 1.0f);
}

#if defined(__AVX512F__)
// 1 / (1 + 2^t) with t = -x log2(e), split as t = n + f, |f| <= 1/2. scalef takes any n, so nothing
// has to be clamped; relative error below 3e-7 wherever the result is above 1e-3.
KDFAST_INLINE VF sigmoid(VF x) {
  const VF t = x * -1.44269504f, n = (VF)_mm512_roundscale_ps((__m512)t, 8), f = t - n;
  VF p = fma(f, fill(1.32647273e-3f), fill(9.67151299e-3f));
  p = fma(p, f, fill(5.55073358e-2f));
  p = fma(p, f, fill(2.40222424e-1f));
  p = fma(p, f, fill(6.93147004e-1f));
  p = fma(p, f, fill(1.0f));
  return 1.0f / (1.0f + (VF)_mm512_scalef_ps((__m512)p, (__m512)n));
}
#endif

template <class In, class A>
KDFAST_INLINE void forward_row(const SwigluNormArgs& a, int64_t r, A* hidden) {
  using V = typename Lanes<A>::V;
  const int64_t size = a.channels;
  const In* gate = static_cast<const In*>(a.gate) + r * a.gate_stride;
  const In* value = static_cast<const In*>(a.value) + r * a.value_stride;
  const A* weight = static_cast<const A*>(a.weight);
  const A* bias = static_cast<const A*>(a.bias);
  In* out = static_cast<In*>(a.out) + r * a.width;

  LaneSum<A> total;
  sweep<A>(
      size,
      [&](int64_t i, int64_t n) {
        const V g = read<A>(gate + i, n), h = g * sigmoid(g) * read<A>(value + i, n);
        total += h;
        write(hidden + i, h, n, false);
      },
      total);
  const A about = A(total.total() / size);
  // The sum was rounded, which rows of little variance would show: what is left of it is added.
  LaneSum<A> left, squares;
  sweep<A>(
      size,
      [&](int64_t i, int64_t n) {
        V d = read<A>(hidden + i, n) - about;
        for (int64_t j = n; j < Lanes<A>::width; ++j) d[j] = 0;
        left += d;
        squares += d * d;
      },
      left, squares);
  const auto rest = left.total() / size;
  const A mean = A(about + rest);
  const auto variance = squares.total() / size - rest * rest;
  const A rstd = A(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + a.eps));
  sweep<A>(size, [&](int64_t i, int64_t n) {
    const V x = (read<A>(hidden + i, n) - mean) * rstd;
    write(out + i, fma(x, read<A>(weight + i, n), read<A>(bias + i, n)), n, a.streamed);
  });
  for (int64_t i = size; i < a.width; ++i) out[i] = In{};
  static_cast<A*>(a.mean)[r] = mean;
  static_cast<A*>(a.rstd)[r] = rstd;
}

// h = silu(gate) value, x = (h - mean) rstd, and what leads back from h.
template <class In, class A>
KDFAST_INLINE void backward_row(const SwigluNormArgs& a, int64_t r, A* sigmoids, A* dweight,
                                A* dbias) {
  using V = typename Lanes<A>::V;
  const int64_t size = a.channels;
  const In* gate = static_cast<const In*>(a.gate) + r * a.gate_stride;
  const In* value = static_cast<const In*>(a.value) + r * a.value_stride;
  const In* grad = static_cast<const In*>(a.grad) + r * a.grad_stride;
  const A* weight = static_cast<const A*>(a.weight);
  In* dgate = static_cast<In*>(a.dgate) + r * a.width;
  In* dvalue = static_cast<In*>(a.dvalue) + r * a.width;
  const A mean = static_cast<const A*>(a.mean)[r], rstd = static_cast<const A*>(a.rstd)[r];

  LaneSum<A> sum, along;
  sweep<A>(
      size,
      [&](int64_t i, int64_t n) {
        const V g = read<A>(gate + i, n), s = sigmoid(g), d = read<A>(grad + i, n);
        const V x = (g * s * read<A>(value + i, n) - mean) * rstd;
        write(sigmoids + i, s, n, false);
        write(dweight + i, fma(d, x, read<A>(dweight + i, n)), n, false);
        write(dbias + i, d + read<A>(dbias + i, n), n, false);
        const V y = d * read<A>(weight + i, n);
        sum += y;
        along += y * x;
      },
      sum, along);
  const A centre = A(sum.total() / size), slope = A(along.total() / size);
  sweep<A>(size, [&](int64_t i, int64_t n) {
    const V g = read<A>(gate + i, n), v = read<A>(value + i, n), s = read<A>(sigmoids + i, n);
    const V silu = g * s, x = (silu * v - mean) * rstd;
    const V y = read<A>(grad + i, n) * read<A>(weight + i, n);
    const V dh = (y - centre - x * slope) * rstd;
    write(dvalue + i, dh * silu, n, a.streamed);
    // d silu / d gate = s (1 + g (1 - s)) = s + silu (1 - s)
    write(dgate + i, dh * v * fma(silu, 1.0f - s, s), n, a.streamed);
  });
  for (int64_t i = size; i < a.width; ++i) dgate[i] = dvalue[i] = In{};
}

template <class In, class A>
void forward_rows(const SwigluNormArgs& a, int64_t begin, int64_t end, void* scratch) {
  for (int64_t r = begin; r < end; ++r) forward_row<In, A>(a, r, static_cast<A*>(scratch));
  if (a.streamed) end_stream();
}

template <class In, class A>
void backward_rows(const SwigluNormArgs& a, int64_t begin, int64_t end, void* scratch, void* sums) {
  A* dweight = static_cast<A*>(sums);
  A* dbias = dweight + a.channels;
  for (int64_t i = 0; i < 2 * a.channels; ++i) dweight[i] = 0;
  for (int64_t r = begin; r < end; ++r) {
    backward_row<In, A>(a, r, static_cast<A*>(scratch), dweight, dbias);
  }
  if (a.streamed) end_stream();
}

void swiglu_norm_rows(const SwigluNormArgs& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.elem) {
    case Element::f16: return forward_rows<Half, float>(a, begin, end, scratch);
    case Element::bf16: return forward_rows<Bf16, float>(a, begin, end, scratch);
    case Element::f32: return forward_rows<float, float>(a, begin, end, scratch);
    case Element::f64: return forward_rows<double, double>(a, begin, end, scratch);
  }
}

void swiglu_norm_bwd_rows(const SwigluNormArgs& a, int64_t begin, int64_t end, void* scratch,
                          void* sums) {
  switch (a.elem) {
    case Element::f16: return backward_rows<Half, float>(a, begin, end, scratch, sums);
    case Element::bf16: return backward_rows<Bf16, float>(a, begin, end, scratch, sums);
    case Element::f32: return backward_rows<float, float>(a, begin, end, scratch, sums);
    case Element::f64: return backward_rows<double, double>(a, begin, end, scratch, sums);
  }
}

}  // namespace
}  // namespace kdfast::cpu
