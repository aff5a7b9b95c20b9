// SPDX-License-Identifier: Apache-2.0
// The formulas of attention_distill for vectors of any type V, of which Math gives splat, exp,
// log1p (of 0 to 1) and larger. Names (P, R, d, x, y): docs/ops/attention_distill.md.
#pragma once
#include "cpu/isa/attention_distill.h"

namespace kdfast::cpu {
namespace {

// Distances that are summed as soon as the exponentials are there; others need normalised maps.
template <MapLoss kind>
constexpr bool kOnePass = kind == MapLoss::kl || kind == MapLoss::reverse_kl;
// Whether d is in the gradient, or R.
template <MapLoss kind>
constexpr bool kByLog = kind == MapLoss::reverse_kl || kind == MapLoss::jsd;
template <MapLoss kind>
constexpr bool kByMap = kind == MapLoss::kl || kind == MapLoss::mse || kind == MapLoss::cosine;

// log(P / M) and log(R / M) of M = (P + R) / 2, by d = log(P / R) alone: no quotient underflows.
template <class Math, class V = typename Math::V>
inline void log_over_middle(V d, V* p, V* r) {
  const V zero = Math::splat(0), minus = zero - d, log_two = Math::splat(0.69314718055994531);
  const V small = Math::log1p(Math::exp(zero - Math::larger(d, minus)));
  *p = log_two - (Math::larger(minus, zero) + small);
  *r = log_two - (Math::larger(d, zero) + small);
}

template <class Math>
struct Sums {
  typename Math::V one, two, three;
};

// Row sums of the kinds whose terms need normalised maps.
template <class Math, MapLoss kind, class V = typename Math::V>
inline Sums<Math> map_terms(V p, V r, V d) {
  const V zero = Math::splat(0);
  if constexpr (kind == MapLoss::jsd) {
    V over_p, over_r;
    log_over_middle<Math>(d, &over_p, &over_r);
    return {p * over_p + r * over_r, p * over_p, zero};
  } else if constexpr (kind == MapLoss::mse) {
    return {(p - r) * (p - r), p * (p - r), zero};
  } else {
    return {p * r, p * p, r * r};
  }
}

// The distance by the sums of a row, and what its gradient needs of them.
template <class T, MapLoss kind>
inline T map_distance(T one, T two, T three, T* first, T* second) {
  *first = two;
  if constexpr (kind == MapLoss::jsd) return one / 2;
  if constexpr (kind == MapLoss::mse) return one;
  const T y = 1 / T(__builtin_sqrt(double(two) * double(three)));
  *first = one * y / two;
  *second = y;
  return 1 - one * y;
}

// The gradient of a row's distance in a, without the factor of gradient_weight.
template <class Math, MapLoss kind, class V = typename Math::V>
inline V map_gradient(V p, V r, V d, V x, V y) {
  if constexpr (kind == MapLoss::kl) return p - r;
  if constexpr (kind == MapLoss::reverse_kl) return p * (d - x);
  if constexpr (kind == MapLoss::mse) return p * (p - r - x);
  if constexpr (kind == MapLoss::cosine) return p * (x * p - y * r);
  V over_p, over_r;
  log_over_middle<Math>(d, &over_p, &over_r);
  return p * (over_p - x);
}

// What ds takes of the gradient in a; of n keys.
template <class T, MapLoss kind>
inline T gradient_weight(T weight, T inv_temperature, int64_t n) {
  const T w = weight * inv_temperature;
  if constexpr (kind == MapLoss::jsd) return w / 2;
  if constexpr (kind == MapLoss::mse) return w * 2;
  if constexpr (kind == MapLoss::logit_mse) return w * 2 * inv_temperature / T(n);
  return w;
}

// Calls f<kind, temper>() for a kind and a temperature.
template <class A, class F>
auto with_kind(MapLoss kind, A inv_temperature, F f) {
  const auto pick = [&]<MapLoss k>() {
    return inv_temperature == 1 ? f.template operator()<k, false>()
                                : f.template operator()<k, true>();
  };
  switch (kind) {
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
