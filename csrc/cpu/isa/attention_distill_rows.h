// SPDX-License-Identifier: Apache-2.0
// One row of scores of attention_distill: distances and gradients, by the formulas of
// attention_distill_terms.h. Local to the including file.
#pragma once
#include "cpu/isa/attention_distill_terms.h"
#include "cpu/isa/vector_math.h"

namespace kdfast::cpu {
namespace {

// Logit of the columns that fill up a vector: its exponential is 0, and it is finite.
template <class T>
constexpr T kNever = T(-1e30);

template <class T>
inline T log_of(T x) {
  return T(__builtin_log(double(x)));
}

// The arithmetic that attention_distill_terms.h asks for.
template <class T>
struct RowMath {
  using V = Vec<T>;
  static V splat(double x) { return cpu::splat(T(x)); }
  static V exp(V x) { return cpu::exp(x); }
  static V log1p(V x) { return log1p_unit(x); }
  static V larger(V a, V b) { return max<T>(a, b); }
};

// The maximum of a row of scores, and the logarithm of the sum of its exponentials above that. Kept
// apart, for their sum would round away the digits that matter when scores are large.
template <class T>
struct Lse {
  Vec<T> top, rest;
};

// The two rows at their temperature: log P, log R from the scores.
template <class T, bool temper>
struct Maps {
  Vec<T> inv;
  Lse<T> student, teacher;
  Vec<T> log_p(Vec<T> s) const { return above(s, student); }
  Vec<T> log_r(Vec<T> t) const { return above(t, teacher); }
  // P and R with a division by the sum of exponentials, `share`: the exponential of a difference of
  // logarithms would turn their rounding into an error of many eps.
  Vec<T> p(Vec<T> s, Vec<T> share) const { return weight(s, student, share); }
  Vec<T> r(Vec<T> t, Vec<T> share) const { return weight(t, teacher, share); }

 private:
  Vec<T> weight(Vec<T> x, const Lse<T>& lse, Vec<T> share) const {
    const Vec<T> over = x - lse.top;
    return exp(temper ? over * inv : over) * share;
  }
  Vec<T> above(Vec<T> x, const Lse<T>& lse) const {
    const Vec<T> over = x - lse.top;
    return (temper ? over * inv : over) - lse.rest;
  }
};

// 1 / (sum of exponentials) from its logarithm.
template <class T>
inline Vec<T> share_of(Vec<T> log_sum) {
  return splat(T(__builtin_exp(-double(log_sum[0]))));
}

// What all rows of a head have in common; statistic k of a row is at stats[k * step].
template <class T>
struct RowTask {
  int64_t n, step, pads;
  T inv_temperature;

  Lse<T> attention(const T* stats) const {
    return {splat(stats[kTop * step]), splat(stats[kLogSum * step])};
  }
  template <bool temper>
  Maps<T, temper> maps(const T* stats) const {
    return {splat(inv_temperature),
            {splat(stats[kTop * step]), splat(stats[kMapLogSum * step])},
            {splat(stats[kTeacherTop * step]), splat(stats[kTeacherLogSum * step])}};
  }
  // What the padded keys weigh in the attention.
  T pad_weight(const T* stats) const {
    return T(pads) * T(__builtin_exp(-double(stats[kTop * step]) - double(stats[kLogSum * step])));
  }
};

template <class A>
RowTask<A> row_task(const DistillHead<A>& head) {
  return {span_tokens(head.span), head.stats_step, head.span.pads, head.inv_temperature};
}

// Everything of one row of n scores: stats[k * step] for k < 5, weights of V in s; returns the
// distance, and in *divisor what the weights still have to be divided by.
template <class T, MapLoss kind, bool temper>
T forward_row(const RowTask<T>& task, T* s, T* t, T* stats, T* divisor) {
  constexpr bool one_pass = kOnePass<kind>;
  constexpr bool logits = kind == MapLoss::logit_mse;
  const int64_t n = task.n, end = round_up(n, kWidth<T>);
  const T inv = task.inv_temperature, pads = T(task.pads);
  for (int64_t j = n; j < end; ++j) s[j] = t[j] = kNever<T>;
  Vec<T> top_s = load_vector(s), top_t = load_vector(t);
  for (int64_t j = kWidth<T>; j < end; j += kWidth<T>) {
    top_s = max<T>(top_s, load_vector(s + j));
    top_t = max<T>(top_t, load_vector(t + j));
  }
  T ms = largest<T>(top_s), mt = largest<T>(top_t);
  if (task.pads > 0) {
    ms = ms > 0 ? ms : 0;
    mt = mt > 0 ? mt : 0;
  }
  Vec<T> sum_s{}, sum_a{}, sum_b{}, sum_d{};
  const auto count = [&](Vec<T> sj, Vec<T> tj, T weight) {
    const Vec<T> x = sj - ms, y = tj - mt, e = exp(x);
    sum_s += weight * e;
    if constexpr (logits) {
      sum_d += weight * ((sj - tj) * inv) * ((sj - tj) * inv);
    } else {
      const Vec<T> ea = temper ? exp(x * inv) : e, eb = exp(temper ? y * inv : y);
      sum_a += weight * ea;
      sum_b += weight * eb;
      if constexpr (one_pass)
        sum_d += weight * (kind == MapLoss::kl ? eb : ea) * (temper ? (x - y) * inv : x - y);
    }
    return e;
  };
  for (int64_t j = 0; j < end; j += kWidth<T>) {
    const Vec<T> e = count(load_vector(s + j), load_vector(t + j), T(1));
    if constexpr (one_pass || logits) store_vector(s + j, e);
  }
  if (task.pads > 0) count(Vec<T>{}, Vec<T>{}, pads / kWidth<T>);
  *divisor = sum<T>(sum_s);
  stats[kTop * task.step] = ms;
  stats[kLogSum * task.step] = log_of(*divisor);
  if constexpr (logits) return sum<T>(sum_d) / T(n);
  const T za = sum<T>(sum_a), zb = sum<T>(sum_b), log_za = log_of(za), log_zb = log_of(zb);
  stats[kMapLogSum * task.step] = log_za;
  stats[kTeacherTop * task.step] = mt;
  stats[kTeacherLogSum * task.step] = log_zb;
  if constexpr (kind == MapLoss::kl) return log_za - log_zb - sum<T>(sum_d) / zb;
  if constexpr (kind == MapLoss::reverse_kl)
    return stats[kFirstSum * task.step] = sum<T>(sum_d) / za - log_za + log_zb;

  const Maps<T, temper> maps = task.template maps<temper>(stats);
  Sums<RowMath<T>> sums{};
  const auto add = [&](Vec<T> sj, Vec<T> tj, T weight) {
    const Vec<T> log_p = maps.log_p(sj), log_r = maps.log_r(tj);
    const Sums<RowMath<T>> terms =
        map_terms<RowMath<T>, kind>(exp(log_p), exp(log_r), log_p - log_r);
    sums.one += weight * terms.one;
    sums.two += weight * terms.two;
    sums.three += weight * terms.three;
  };
  for (int64_t j = 0; j < end; j += kWidth<T>) {
    const Vec<T> sj = load_vector(s + j);
    add(sj, load_vector(t + j), T(1));
    store_vector(s + j, exp(sj - ms));
  }
  if (task.pads > 0) add(Vec<T>{}, Vec<T>{}, pads / kWidth<T>);
  T first, second = 0;
  const T distance = map_distance<T, kind>(sum<T>(sums.one), sum<T>(sums.two), sum<T>(sums.three),
                                           &first, &second);
  stats[kFirstSum * task.step] = first;
  if constexpr (kind == MapLoss::cosine) stats[kSecondSum * task.step] = second;
  return distance;
}

// s, t, dp: one row of `keys` scores, the teacher's, and <g, v>; dp becomes ds and s becomes U.
template <class T, MapLoss kind, bool temper>
void backward_row(const RowTask<T>& task, int64_t keys, const T* stats, T delta, T weight, T* s,
                  T* t, T* dp) {
  const int64_t end = round_up(keys, kWidth<T>);
  for (int64_t j = keys; j < end; ++j) s[j] = t[j] = kNever<T>;
  constexpr bool logits = kind == MapLoss::logit_mse;
  constexpr bool one_sum = !logits && kind != MapLoss::kl;
  const Lse<T> lse = task.attention(stats);
  Maps<T, temper> maps;
  if constexpr (!logits) maps = task.template maps<temper>(stats);
  const Vec<T> x = splat(one_sum ? stats[kFirstSum * task.step] : T(0));
  const Vec<T> y = splat(kind == MapLoss::cosine ? stats[kSecondSum * task.step] : T(0));
  const T w = gradient_weight<T, kind>(weight, task.inv_temperature, task.n);
  const Vec<T> share = share_of<T>(lse.rest);
  Vec<T> share_p = share, share_r{};
  if constexpr (!logits) share_r = share_of<T>(maps.teacher.rest);
  if constexpr (!logits && temper) share_p = share_of<T>(maps.student.rest);
  for (int64_t j = 0; j < end; j += kWidth<T>) {
    const Vec<T> sj = load_vector(s + j), tj = load_vector(t + j);
    const Vec<T> u = exp(sj - lse.top) * share, attention = u * (load_vector(dp + j) - delta);
    Vec<T> da;
    if constexpr (logits) {
      da = sj - tj;
    } else {
      const Vec<T> p = temper ? maps.p(sj, share_p) : u;
      Vec<T> r{}, d{};
      if constexpr (kByMap<kind>) r = maps.r(tj, share_r);
      if constexpr (kByLog<kind>) d = maps.log_p(sj) - maps.log_r(tj);
      da = map_gradient<RowMath<T>, kind>(p, r, d, x, y);
    }
    store_vector(s + j, u);
    store_vector(dp + j, attention + w * da);
  }
}

}  // namespace
}  // namespace kdfast::cpu
