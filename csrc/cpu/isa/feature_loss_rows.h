// SPDX-License-Identifier: Apache-2.0
// The rows of feature_loss, for whatever instruction set the including file is compiled for.
// A row is swept once for each number that the next sweep needs. Formulas:
// docs/ops/feature_loss.md.
#pragma once
#include "cpu/isa/feature_loss.h"
#include "cpu/isa/lanes.h"

namespace kdfast::cpu {
namespace {

template <class V>
struct Pair {
  V s, t;
};

// One row of both sides, normalised while it is read.
template <class In, class A, FeatureNorm norm>
struct RowPair {
  using V = typename Lanes<A>::V;
  static constexpr int W = Lanes<A>::width;

  const In* s;
  const In* t;
  const A* mean;   // (features), channel only
  const A* scale;  // (features), channel only
  int64_t features;
  A mean_s = 0, mean_t = 0, scale_s = 1, scale_t = 1;  // layer only

  // n < W: the lanes beyond are 0.
  KDFAST_INLINE Pair<V> at(int64_t i, int64_t n) const {
    Pair<V> x = n == W ? Pair<V>{load(s + i), load(t + i)}
                       : Pair<V>{load_some<A>(s + i, n, 0), load_some<A>(t + i, n, 0)};
    if constexpr (norm == FeatureNorm::layer) {
      x = {(x.s - mean_s) * scale_s, (x.t - mean_t) * scale_t};
    }
    if constexpr (norm == FeatureNorm::channel) {
      const V m = n == W ? load(mean + i) : load_some<A>(mean + i, n, 0);
      const V k = n == W ? load(scale + i) : load_some<A>(scale + i, n, 0);
      x = {(x.s - m) * k, (x.t - m) * k};
    }
    for (int64_t j = n; j < W; ++j) x.s[j] = x.t[j] = 0;
    return x;
  }

  // fn(i, n, x) for every vector of the row; n < W in the last one only. Empties the sums that fn
  // adds to after every kShort vectors.
  template <class F, class... S>
  KDFAST_INLINE void sweep(const F& fn, S&... sums) const {
    int64_t i = 0;
    for (; i + kShort * W <= features; i += kShort * W) {
      for (int64_t j = 0; j < kShort; ++j) fn(i + j * W, W, at(i + j * W, W));
      (sums.flush(), ...);
    }
    for (; i + W <= features; i += W) fn(i, W, at(i, W));
    if (i < features) fn(i, features - i, at(i, features - i));
    (sums.flush(), ...);
  }
};

// The norms that turn a row into unit vectors.
template <class A>
struct Units {
  A s, t;       // 1 / norm, or 0
  bool differ;  // one of the two has no direction: the cost is 1, without gradient
};

template <class A, class R>
KDFAST_INLINE Units<A> unit_scales(const R& x, double zero_norm) {
  using V = typename Lanes<A>::V;
  LaneSum<A> ss, tt;
  x.sweep(
      [&](int64_t, int64_t, Pair<V> p) {
        ss += p.s * p.s;
        tt += p.t * p.t;
      },
      ss, tt);
  const double s = ss.total(), t = tt.total(), zero = zero_norm * zero_norm;
  const bool no_s = s <= zero, no_t = t <= zero;
  return {no_s ? A(0) : A(1 / __builtin_sqrt(s)), no_t ? A(0) : A(1 / __builtin_sqrt(t)),
          no_s != no_t};
}

template <class In, class A>
KDFAST_INLINE void layer_moments(RowPair<In, A, FeatureNorm::layer>& x, double eps) {
  using V = typename Lanes<A>::V;
  const RowPair<In, A, FeatureNorm::none> raw{x.s, x.t, nullptr, nullptr, x.features};
  LaneSum<A> s, t, ss, tt;
  raw.sweep(
      [&](int64_t, int64_t, Pair<V> p) {
        s += p.s;
        t += p.t;
      },
      s, t);
  x.mean_s = A(s.total() / x.features);
  x.mean_t = A(t.total() / x.features);
  x.sweep(
      [&](int64_t, int64_t, Pair<V> p) {
        ss += p.s * p.s;
        tt += p.t * p.t;
      },
      ss, tt);
  x.scale_s = A(1 / __builtin_sqrt(ss.total() / x.features + eps));
  x.scale_t = A(1 / __builtin_sqrt(tt.total() / x.features + eps));
}

// Loss of one vector, and its gradient by the normalised student.
template <FeatureKind kind, class V>
KDFAST_INLINE Pair<V> distance(V s, V t) {
  const V d = s - t;
  if constexpr (kind == FeatureKind::mse) return {d * d, d + d};
  const V size = d < 0 ? -d : d;
  const V near = d * d * 0.5f, far = size - 0.5f;
  const V one = V{} + 1.0f, sign = d < 0 ? -one : one;
  return {size < 1 ? near : far, size >= 1 ? sign : d};
}

template <class In, class Out, class A, FeatureNorm norm>
struct Gradient {
  using V = typename Lanes<A>::V;
  static constexpr int W = Lanes<A>::width;
  const FeatureLossArgs& a;
  const RowPair<In, A, norm>& x;
  Out* out;
  A mean_g = 0, mean_gx = 0;  // layer only

  // g is the gradient by the normalised student; what is stored is the gradient by the student.
  KDFAST_INLINE void write(int64_t i, int64_t n, V g, V x_hat) const {
    if constexpr (norm == FeatureNorm::layer) g = (g - mean_g - x_hat * mean_gx) * x.scale_s;
    if constexpr (norm == FeatureNorm::channel) {
      g *= n == W ? load(x.scale + i) : load_some<A>(x.scale + i, n, 0);
    }
    g *= A(a.weight);
    if (n != W) return store_some(out + i, g, n);
    // Streamed stores need an aligned address.
    if (a.streamed && reinterpret_cast<uintptr_t>(out + i) % kVecBytes == 0) {
      stream(out + i, g);
    } else {
      store(out + i, g);
    }
  }
};

// Mean of g and of g x over the row, which the gradient through a layer normalisation takes off.
template <class A, class R, class G, class F>
KDFAST_INLINE void project(const R& x, G& gradient, const F& g_of) {
  using V = typename Lanes<A>::V;
  LaneSum<A> g_sum, gx_sum;
  x.sweep(
      [&](int64_t, int64_t, Pair<V> p) {
        const V g = g_of(p);
        g_sum += g;
        gx_sum += g * p.s;
      },
      g_sum, gx_sum);
  gradient.mean_g = A(g_sum.total() / x.features);
  gradient.mean_gx = A(gx_sum.total() / x.features);
}

template <FeatureKind kind, FeatureNorm norm, class In, class Out, class A>
void one_row(const FeatureLossArgs& a, int64_t r) {
  using V = typename Lanes<A>::V;
  RowPair<In, A, norm> x{static_cast<const In*>(a.student) + r * a.student_stride,
                         static_cast<const In*>(a.teacher) + r * a.teacher_stride,
                         static_cast<const A*>(a.mean), static_cast<const A*>(a.scale), a.features};
  if constexpr (norm == FeatureNorm::layer) layer_moments(x, a.eps);
  Out* out = a.grad ? static_cast<Out*>(a.grad) + r * a.features : nullptr;
  Gradient<In, Out, A, norm> gradient{a, x, out};
  LaneSum<A> total;

  if constexpr (kind == FeatureKind::cosine) {
    const Units<A> unit = unit_scales<A>(x, a.zero_norm);
    x.sweep(
        [&](int64_t, int64_t, Pair<V> p) {
          const V d = p.s * unit.s - p.t * unit.t;
          total += d * d;
        },
        total);
    const double loss = 0.5 * total.total();
    a.loss[r] = unit.differ && loss == loss ? 1.0 : loss;
    if (!out) return;
    // A vector without direction has scale 0; if the other has one, its gradient is dropped too.
    const A outer = unit.differ ? A(0) : unit.s, inner = A(loss);
    const auto g_of = [&](Pair<V> p) {
      const V u = p.s * unit.s;
      return ((u - p.t * unit.t) - u * inner) * outer;
    };
    if constexpr (norm == FeatureNorm::layer) project<A>(x, gradient, g_of);
    x.sweep([&](int64_t i, int64_t n, Pair<V> p) { gradient.write(i, n, g_of(p), p.s); });
  } else {
    const auto g_of = [](Pair<V> p) { return distance<kind>(p.s, p.t).t; };
    if constexpr (norm == FeatureNorm::layer) {
      if (out) project<A>(x, gradient, g_of);
    }
    x.sweep(
        [&](int64_t i, int64_t n, Pair<V> p) {
          const Pair<V> d = distance<kind>(p.s, p.t);
          total += d.s;
          if (out) gradient.write(i, n, d.t, p.s);
        },
        total);
    a.loss[r] = total.total();
  }
}

template <FeatureKind kind, class In, class Out, class A>
void rows_of(const FeatureLossArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    switch (a.norm) {
      case FeatureNorm::none: one_row<kind, FeatureNorm::none, In, Out, A>(a, r); break;
      case FeatureNorm::layer: one_row<kind, FeatureNorm::layer, In, Out, A>(a, r); break;
      case FeatureNorm::channel: one_row<kind, FeatureNorm::channel, In, Out, A>(a, r); break;
    }
  }
  if (a.streamed) end_stream();
}

template <class In, class Out, class A>
void rows_of(const FeatureLossArgs& a, int64_t begin, int64_t end) {
  switch (a.kind) {
    case FeatureKind::mse: return rows_of<FeatureKind::mse, In, Out, A>(a, begin, end);
    case FeatureKind::smooth_l1: return rows_of<FeatureKind::smooth_l1, In, Out, A>(a, begin, end);
    case FeatureKind::cosine: return rows_of<FeatureKind::cosine, In, Out, A>(a, begin, end);
  }
}

// Adds rows r to r + kRows - 1 to the sums, in order: so the sums are loaded and stored once.
template <int kRows, class In, class A>
KDFAST_INLINE void add_channels(const FeatureLossArgs& a, int64_t r, const A* shift, A* sums) {
  using V = typename Lanes<A>::V;
  constexpr int W = Lanes<A>::width;
  A* squares = sums + a.features;
  const In* t = static_cast<const In*>(a.teacher) + r * a.teacher_stride;
  int64_t i = 0;
  for (; i + W <= a.features; i += W) {
    V sum = load(sums + i), square = load(squares + i);
    const V base = shift ? load(shift + i) : V{};
    for (int k = 0; k < kRows; ++k) {
      const V d = load(t + k * a.teacher_stride + i) - base;
      sum += d;
      square = fma(d, d, square);
    }
    store(sums + i, sum);
    store(squares + i, square);
  }
  for (; i < a.features; ++i)
    for (int k = 0; k < kRows; ++k) {
      const A d = load_some<A>(t + k * a.teacher_stride + i, 1, 0)[0] - (shift ? shift[i] : 0);
      sums[i] += d;
      squares[i] += d * d;
    }
}

template <class In, class A>
void channel_sums_of(const FeatureLossArgs& a, int64_t begin, int64_t end, const A* shift,
                     A* sums) {
  constexpr int kRows = 8;
  for (int64_t i = 0; i < 2 * a.features; ++i) sums[i] = 0;
  int64_t r = begin;
  for (; r + kRows <= end; r += kRows) add_channels<kRows, In>(a, r, shift, sums);
  for (; r < end; ++r) add_channels<1, In>(a, r, shift, sums);
}

void feature_loss_rows(const FeatureLossArgs& a, int64_t begin, int64_t end) {
  switch (a.elem) {
    case Element::f16: return rows_of<Half, float, float>(a, begin, end);
    case Element::bf16: return rows_of<Bf16, Bf16, float>(a, begin, end);
    case Element::f32: return rows_of<float, float, float>(a, begin, end);
    case Element::f64: return rows_of<double, double, double>(a, begin, end);
  }
}

void channel_sums(const FeatureLossArgs& a, int64_t begin, int64_t end, const void* shift,
                  void* sums) {
  const float* shift_f = static_cast<const float*>(shift);
  float* sums_f = static_cast<float*>(sums);
  switch (a.elem) {
    case Element::f16: return channel_sums_of<Half, float>(a, begin, end, shift_f, sums_f);
    case Element::bf16: return channel_sums_of<Bf16, float>(a, begin, end, shift_f, sums_f);
    case Element::f32: return channel_sums_of<float, float>(a, begin, end, shift_f, sums_f);
    case Element::f64:
      return channel_sums_of<double>(a, begin, end, static_cast<const double*>(shift),
                                     static_cast<double*>(sums));
  }
}

}  // namespace
}  // namespace kdfast::cpu
