// SPDX-License-Identifier: Apache-2.0
// One row of scores of attention_distill: distances and gradients. Formulas and names (a, b, A, B,
// P, R, d, x, y): docs/attention_distill.md. Local to the including file.
#pragma once
#include "cpu/isa/attention_distill.h"
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

// Of all rows of a head; statistic k of a row is at stats[k * step].
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

// log(P / M) and log(R / M) of M = (P + R) / 2, by d = log(P / R) alone: no quotient underflows.
template <class T>
inline void log_over_middle(Vec<T> d, Vec<T>* p, Vec<T>* r) {
  const Vec<T> zero{}, size = d > zero ? d : -d, small = log1p_unit(exp(-size));
  *p = T(0.69314718055994531) - (max<T>(-d, zero) + small);
  *r = T(0.69314718055994531) - (max<T>(d, zero) + small);
}

template <class T>
struct Sums {
  Vec<T> one, two, three;
};

// Row sums of the kinds whose terms need normalised maps.
template <class T, MapLoss kind, bool temper>
inline Sums<T> map_terms(const Maps<T, temper>& maps, Vec<T> s, Vec<T> t) {
  const Vec<T> log_p = maps.log_p(s), log_r = maps.log_r(t), p = exp(log_p), r = exp(log_r);
  if constexpr (kind == MapLoss::jsd) {
    Vec<T> over_p, over_r;
    log_over_middle<T>(log_p - log_r, &over_p, &over_r);
    return {p * over_p + r * over_r, p * over_p, Vec<T>{}};
  } else if constexpr (kind == MapLoss::mse) {
    return {(p - r) * (p - r), p * (p - r), Vec<T>{}};
  } else {
    return {p * r, p * p, r * r};
  }
}

// Everything of one row of n scores: stats[k * step] for k < 5, weights of V in s; returns the
// distance, and in *divisor what the weights still have to be divided by.
template <class T, MapLoss kind, bool temper>
T forward_row(const RowTask<T>& task, T* s, T* t, T* stats, T* divisor) {
  constexpr bool one_pass = kind == MapLoss::kl || kind == MapLoss::reverse_kl;
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
  Sums<T> sums{};
  const auto add = [&](Vec<T> sj, Vec<T> tj, T weight) {
    const Sums<T> terms = map_terms<T, kind, temper>(maps, sj, tj);
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
  const T one = sum<T>(sums.one), two = sum<T>(sums.two), three = sum<T>(sums.three);
  if constexpr (kind != MapLoss::cosine) {
    stats[kFirstSum * task.step] = two;
    return kind == MapLoss::jsd ? one / 2 : one;
  }
  const T y = 1 / T(__builtin_sqrt(double(two) * double(three)));
  stats[kFirstSum * task.step] = one * y / two;
  stats[kSecondSum * task.step] = y;
  return 1 - one * y;
}

// s, t, dp: one row of `keys` scores, the teacher's, and <g, v>; dp becomes ds and s becomes U.
template <class T, MapLoss kind, bool temper>
void backward_row(const RowTask<T>& task, int64_t keys, const T* stats, T delta, T weight, T* s,
                  T* t, T* dp) {
  const int64_t n = task.n, end = round_up(keys, kWidth<T>);
  for (int64_t j = keys; j < end; ++j) s[j] = t[j] = kNever<T>;
  constexpr bool logits = kind == MapLoss::logit_mse;
  constexpr bool one_sum = kind == MapLoss::reverse_kl || kind == MapLoss::jsd ||
                           kind == MapLoss::mse || kind == MapLoss::cosine;
  const T inv = task.inv_temperature;
  const Lse<T> lse = task.attention(stats);
  Maps<T, temper> maps;
  if constexpr (!logits) maps = task.template maps<temper>(stats);
  const T x = one_sum ? stats[kFirstSum * task.step] : 0;
  const T y = kind == MapLoss::cosine ? stats[kSecondSum * task.step] : 0;
  T w = weight * inv;
  if constexpr (kind == MapLoss::jsd) w /= 2;
  if constexpr (kind == MapLoss::mse) w *= 2;
  if constexpr (logits) w *= 2 * inv / T(n);
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
      const Vec<T> log_p = maps.log_p(sj), log_r = maps.log_r(tj);
      const Vec<T> p = temper ? maps.p(sj, share_p) : u;
      if constexpr (kind == MapLoss::kl) {
        da = p - maps.r(tj, share_r);
      } else if constexpr (kind == MapLoss::reverse_kl) {
        da = p * (log_p - log_r - x);
      } else if constexpr (kind == MapLoss::jsd) {
        Vec<T> over_p, over_r;
        log_over_middle<T>(log_p - log_r, &over_p, &over_r);
        da = p * (over_p - x);
      } else if constexpr (kind == MapLoss::mse) {
        da = p * (p - maps.r(tj, share_r) - x);
      } else {
        da = p * (x * p - y * maps.r(tj, share_r));
      }
    }
    store_vector(s + j, u);
    store_vector(dp + j, attention + w * da);
  }
}

// Calls f<kind, temper>() for the head's kind and temperature.
template <class A, class F>
auto with_kind(const DistillHead<A>& head, F f) {
  const auto pick = [&]<MapLoss kind>() {
    return head.inv_temperature == 1 ? f.template operator()<kind, false>()
                                     : f.template operator()<kind, true>();
  };
  switch (head.kind) {
    case MapLoss::kl: return pick.template operator()<MapLoss::kl>();
    case MapLoss::reverse_kl: return pick.template operator()<MapLoss::reverse_kl>();
    case MapLoss::jsd: return pick.template operator()<MapLoss::jsd>();
    case MapLoss::mse: return pick.template operator()<MapLoss::mse>();
    case MapLoss::cosine: return pick.template operator()<MapLoss::cosine>();
    default: return pick.template operator()<MapLoss::logit_mse>();
  }
}

}  // namespace
}  // namespace kdfast::cpu
