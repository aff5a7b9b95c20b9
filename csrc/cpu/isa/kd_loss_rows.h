// SPDX-License-Identifier: Apache-2.0
// The rows of kd_loss, for whatever instruction set the including file is compiled for.
// Three sweeps over a row: maxima, sums of exponentials, gradient. Formulas: docs/ops/kd_loss.md.
#pragma once
#include "cpu/isa/kd_loss.h"
#include "cpu/isa/lanes.h"

namespace kdfast::cpu {
namespace {

// Which weights the cross-entropy has: none, one label, or one for each class.
enum class Ce { none, label, dense };

// Vectors after which the lanes' sums are emptied into doubles, so long rows lose no digits.
constexpr int64_t kFlush = kVecBytes;
// Temperature above which rows are finished by finish_warm; as WARM in kdfast/ops/_divergence.py.
constexpr double kWarm = 32;

template <class A>
struct Row {
  using V = typename Lanes<A>::V;

  A max_s, max_t;
  double z1 = 0, zs = 0, zt = 0;  // normalisers: student at 1, student and teacher at T
  double cross = 0;               // sum of exp(t') (t' - s'), t' and s' relative to the maxima, / T
  double q = 0, q_s = 0;          // sums of the dense weights q, and of q (s - max_s)
  A *e1, *es, *et;                // (classes + padding) exponentials, kept for the gradient
};

template <class A>
struct Weights {
  const A* soft;  // (classes), or null
  A keep, spread;
};

template <class In, class A>
KDFAST_INLINE void find_maxima(const In* s, const In* t, int64_t classes, Row<A>& row) {
  using V = typename Lanes<A>::V;
  constexpr int W = Lanes<A>::width;
  const A lowest = -static_cast<A>(__builtin_inf());
  V max_s = fill(lowest), max_t = fill(lowest);
  int64_t i = 0;
  for (; i + W <= classes; i += W) {
    max_s = larger(max_s, load(s + i));
    max_t = larger(max_t, load(t + i));
  }
  if (i < classes) {
    max_s = larger(max_s, load_some<A>(s + i, classes - i, lowest));
    max_t = larger(max_t, load_some<A>(t + i, classes - i, lowest));
  }
  row.max_s = largest(max_s);
  row.max_t = largest(max_t);
}

template <class A>
struct Sums {
  typename Lanes<A>::V z1{}, zs{}, zt{}, cross{}, q{}, q_s{};
};

// One vector of the second sweep; lanes beyond the row hold -inf logits and weight 0.
template <Ce ce, bool unit, class A, class V>
KDFAST_INLINE void accumulate(V s, V t, V q, A inv_t, int64_t i, Row<A>& row, Sums<A>& sums) {
  const V ds = s - row.max_s, dt = t - row.max_t;
  const V es = exp_negative(ds * inv_t), et = exp_negative(dt * inv_t);
  store(row.es + i, es);
  store(row.et + i, et);
  sums.zs += es;
  sums.zt += et;
  // Where the teacher's probability is 0 the term is 0, even if the difference is infinite.
  sums.cross += et == 0 ? V{} : et * (dt - ds);
  if constexpr (ce != Ce::none) {
    const V e1 = unit ? es : exp_negative(ds);
    store(row.e1 + i, e1);
    sums.z1 += e1;
  }
  if constexpr (ce == Ce::dense) {
    sums.q += q;
    sums.q_s += q == 0 ? V{} : q * ds;
  }
}

template <class A>
KDFAST_INLINE typename Lanes<A>::V dense_weights(const Weights<A>& w, int64_t i) {
  return w.soft ? load(w.soft + i) * w.keep + w.spread : fill(w.spread);
}

template <class A>
KDFAST_INLINE typename Lanes<A>::V dense_weights(const Weights<A>& w, int64_t i, int64_t n) {
  typename Lanes<A>::V q =
      w.soft ? load_some<A>(w.soft + i, n, 0) * w.keep + w.spread : fill(w.spread);
  for (int64_t j = n; j < Lanes<A>::width; ++j) q[j] = 0;
  return q;
}

template <Ce ce, bool unit, class In, class A>
void add_up(const In* s, const In* t, const Weights<A>& w, int64_t classes, A inv_t,
            int64_t stride_s, int64_t stride_t, Row<A>& row) {
  using V = typename Lanes<A>::V;
  constexpr int W = Lanes<A>::width;
  const A lowest = -static_cast<A>(__builtin_inf());
  for (int64_t from = 0; from < classes; from += kFlush * W) {
    const int64_t to = from + kFlush * W < classes ? from + kFlush * W : classes;
    Sums<A> sums;
    int64_t i = from;
    for (; i + W <= to; i += W) {
      // The next row arrives while this one is computed.
      __builtin_prefetch(s + i + stride_s, 0, 2);
      __builtin_prefetch(t + i + stride_t, 0, 2);
      const V q = ce == Ce::dense ? dense_weights(w, i) : V{};
      accumulate<ce, unit>(load(s + i), load(t + i), q, inv_t, i, row, sums);
    }
    if (i < to) {
      const V q = ce == Ce::dense ? dense_weights(w, i, to - i) : V{};
      const V some_s = load_some<A>(s + i, to - i, lowest);
      const V some_t = load_some<A>(t + i, to - i, lowest);
      accumulate<ce, unit>(some_s, some_t, q, inv_t, i, row, sums);
    }
    row.z1 += sum(sums.z1);
    row.zs += sum(sums.zs);
    row.zt += sum(sums.zt);
    row.cross += sum(sums.cross);
    if (w.soft) row.q += sum(sums.q);
    row.q_s += sum(sums.q_s);
  }
}

// c_s es - c_t et is exactly 0 for equal rows only because these files are compiled without
// contraction of a product and a sum into one rounding (CMakeLists.txt).
template <Ce ce, class Out, class A>
void write_gradient(const Row<A>& row, const Weights<A>& w, int64_t classes, A c_s, A c_t, A c_1,
                    A c_q, bool streamed, Out* grad) {
  using V = typename Lanes<A>::V;
  constexpr int W = Lanes<A>::width;
  int64_t i = 0;
  const auto gradient = [&](int64_t n) {
    V g = load(row.es + i) * c_s - load(row.et + i) * c_t;
    if constexpr (ce != Ce::none) g = fma(load(row.e1 + i), fill(c_1), g);
    if constexpr (ce == Ce::dense) {
      g -= (n == W ? dense_weights(w, i) : dense_weights(w, i, n)) * c_q;
    }
    return g;
  };
  if (streamed) {
    // Rows start anywhere, streamed stores do not.
    const int64_t skip = reinterpret_cast<uintptr_t>(grad) % kVecBytes;
    const int64_t whole = skip ? (kVecBytes - skip) / static_cast<int64_t>(sizeof(Out)) : 0;
    const int64_t head = whole < classes ? whole : classes;
    for (; i + W <= head; i += W) store(grad + i, gradient(W));  // two vectors, where Out is narrow
    if (i < head) {
      store_some(grad + i, gradient(head - i), head - i);
      i = head;
    }
    for (; i + W <= classes; i += W) stream(grad + i, gradient(W));
  }
  for (; i + W <= classes; i += W) store(grad + i, gradient(W));
  if (i < classes) store_some(grad + i, gradient(classes - i), classes - i);
}

// (e^w - 1 - w) / w^2 for |w| < 0.05.
KDFAST_INLINE double curve_series(double w) {
  double sum = 1;
  for (int n = 9; n >= 3; --n) sum = 1 + sum * w / n;
  return sum / 2;
}

// kd at a high temperature T, where KL and its gradient are small differences of large numbers.
// With R = p_T(t), u = s - t less its mean under R and w = u / T, KL = log E[e^w] = log1p(E[e^w - 1
// - w]) and T (p_T(s) - R) = R T (e^w / E[e^w] - 1), in which nothing cancels. Writes *kd, and the
// latter times zt to row.es; false, and nothing written, where w is not small or a class is ruled
// out.
template <class In, class A>
[[gnu::noinline]] bool finish_warm(const KdLossArgs& a, const In* s, const In* t, Row<A>& row,
                                   double* kd) {
  const double temperature = a.temperature;
  const auto difference = [&](int64_t i) { return double(load<A>(s[i])) - load<A>(t[i]); };
  double mean = 0;
  for (int64_t i = 0; i < a.classes; ++i) {
    if (row.et[i] == 0 && row.es[i] == 0) continue;
    mean += double(row.et[i]) * difference(i);
  }
  mean /= row.zt;
  double curved = 0;  // T^2 E[e^w - 1 - w]
  for (int64_t i = 0; i < a.classes; ++i) {
    if (row.et[i] == 0 && row.es[i] == 0) continue;
    const double u = difference(i) - mean, w = u / temperature;
    if (!(w <= 1 && w >= -1)) return false;
    const bool small = w < 0.05 && w > -0.05;
    curved += row.et[i] * u * u * (small ? curve_series(w) : (__builtin_expm1(w) - w) / (w * w));
  }
  curved /= row.zt;
  const double rest = curved / temperature / temperature;
  *kd = rest < 1e-9 ? curved * (1 - rest / 2) : temperature * temperature * __builtin_log1p(rest);
  for (int64_t i = 0; a.grad != nullptr && i < a.classes; ++i) {
    if (row.et[i] == 0 && row.es[i] == 0) continue;
    const double u = difference(i) - mean, w = u / temperature;
    const bool small = w < 1e-9 && w > -1e-9;
    const double grown = small ? u * (1 + w / 2) : temperature * __builtin_expm1(w);
    row.es[i] = A(row.et[i] * (grown - curved / temperature) / (1 + rest));
  }
  return true;
}

// Not inlined: in one function with the other kinds of target, gcc made rows of bf16 a quarter
// slower without AVX2.
template <Ce ce, class In, class Out, class A>
[[gnu::noinline]] void one_row(const KdLossArgs& a, int64_t r, A* scratch) {
  const In* s = static_cast<const In*>(a.student) + r * a.student_stride;
  const In* t = static_cast<const In*>(a.teacher) + r * a.teacher_stride;
  const int64_t padded = kd_loss_scratch(a.classes) / 3;
  Row<A> row;
  row.es = scratch;
  row.et = scratch + padded;
  row.e1 = scratch + 2 * padded;
  find_maxima(s, t, a.classes, row);
  const A* soft = a.soft ? static_cast<const A*>(a.soft) + r * a.classes : nullptr;
  if (ce == Ce::dense && !soft) row.q = a.smoothing;
  const Weights<A> w{soft, A(1 - a.smoothing), A(a.smoothing / a.classes)};
  // Near 0 a temperature leaves nothing but the largest logits, which any large factor does. A very
  // high one leaves no difference, but -inf, which fills the last vector, must stay -inf.
  const double most = sizeof(A) == sizeof(double) ? 1e300 : 1e37, inverse = 1 / a.temperature;
  const A inv_t = A(inverse < most ? (inverse > 1 / most ? inverse : 1 / most) : most);
  if (inv_t == 1) {
    add_up<ce, true>(s, t, w, a.classes, inv_t, a.student_stride, a.teacher_stride, row);
  } else {
    add_up<ce, false>(s, t, w, a.classes, inv_t, a.student_stride, a.teacher_stride, row);
  }

  const double change = __builtin_log(row.zs) - __builtin_log(row.zt);
  const bool warm = a.temperature > kWarm && finish_warm(a, s, t, row, a.kd + r);
  // T^2 KL; where the logarithms agree T^2 must not be infinite times zero.
  if (!warm)
    a.kd[r] = a.temperature * (row.cross / row.zt + (change == 0 ? 0 : a.temperature * change));
  a.ce[r] = 0;
  const int64_t label = ce != Ce::none && a.labels ? a.labels[r] : -1;
  const double hot = label < 0 ? 0 : 1 - a.smoothing;
  if constexpr (ce != Ce::none) {
    a.ce[r] = (row.q + hot) * __builtin_log(row.z1) - row.q_s;
    if (hot != 0) a.ce[r] -= hot * (load_some<A>(s + label, 1, 0)[0] - row.max_s);
  }
  if (!a.grad) return;

  Out* grad = static_cast<Out*>(a.grad) + r * a.classes;
  // A loss without weight has no gradient, whatever the teacher says.
  if (a.kd_weight == 0) row.et = row.es;
  const double kd_weight = a.kd_weight * a.temperature;
  const A c_s = A(warm ? a.kd_weight / row.zt : kd_weight / row.zs);
  const A c_t = A(warm || a.kd_weight == 0 ? 0 : kd_weight / row.zt);
  const A c_1 = ce == Ce::none ? 0 : A(a.ce_weight * (row.q + hot) / row.z1);
  write_gradient<ce>(row, w, a.classes, c_s, c_t, c_1, A(a.ce_weight), a.streamed, grad);
  if (hot != 0) {
    // Again from the parts, because the stored element has been rounded to its type.
    const double weight = ce == Ce::dense ? hot + a.smoothing / a.classes : hot;
    const A g = row.es[label] * c_s - row.et[label] * c_t;
    store_some(grad + label, fill(g + (row.e1[label] * c_1 - A(a.ce_weight * weight))), 1);
  }
}

template <class In, class Out, class A>
void rows_of(const KdLossArgs& a, int64_t begin, int64_t end, A* scratch) {
  for (int64_t r = begin; r < end; ++r) {
    if (a.soft || (a.labels && a.smoothing != 0 && a.labels[r] != a.ignore_index)) {
      one_row<Ce::dense, In, Out>(a, r, scratch);
    } else if (a.labels && a.labels[r] != a.ignore_index) {
      one_row<Ce::label, In, Out>(a, r, scratch);
    } else {
      one_row<Ce::none, In, Out>(a, r, scratch);
    }
  }
  if (a.streamed) end_stream();
}

void kd_loss_rows(const KdLossArgs& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.elem) {
    case Element::f16: return rows_of<Half, float>(a, begin, end, static_cast<float*>(scratch));
    case Element::bf16: return rows_of<Bf16, Bf16>(a, begin, end, static_cast<float*>(scratch));
    case Element::f32: return rows_of<float, float>(a, begin, end, static_cast<float*>(scratch));
    case Element::f64: return rows_of<double, double>(a, begin, end, static_cast<double*>(scratch));
  }
}

}  // namespace
}  // namespace kdfast::cpu
