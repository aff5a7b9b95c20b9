// SPDX-License-Identifier: Apache-2.0
// 2^f and e^x, for every type of vectors in this folder. Ops says what the type is:
//   V, splat(float) and fma(a, b, c) = a b + c; for e^x also I, the integers of V's width, and V is
//   then a vector type of the compiler
// Included by files compiled for one instruction set only, hence the anonymous namespace.
#pragma once
#include <cstdint>

namespace kdfast::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// Coefficients of polynomials for 2^f on [-0.5, 0.5], the highest first.
template <int kDegree>
struct Exp2Terms;
template <>
struct Exp2Terms<3> {  // relative error 7.5e-5
  static constexpr float value[] = {0.0551716695f, 0.242611125f, 0.693260986f, 0.999928073f};
};
template <>
struct Exp2Terms<6> {  // relative error 1.9e-9
  static constexpr float value[] = {0.000153458121f,
                                    0.00133999313f,
                                    0.00961848896f,
                                    0.0555032878f,
                                    0.240226469f,
                                    0.693147206f,
                                    1.0f};
};

template <class Ops, int kDegree>
__attribute__((always_inline)) inline typename Ops::V exp2_series(typename Ops::V f) {
  typename Ops::V p = Ops::splat(Exp2Terms<kDegree>::value[0]);
#pragma GCC unroll 8
  for (int i = 1; i <= kDegree; ++i) p = Ops::fma(p, f, Ops::splat(Exp2Terms<kDegree>::value[i]));
  return p;
}

// e^x for x <= 88 and NaN: relative error below 2e-7, and 0 below the smallest normal number.
template <class Ops>
__attribute__((always_inline)) inline typename Ops::V exp_of(typename Ops::V x) {
  using V = typename Ops::V;
  using I = typename Ops::I;
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
  const V magic = Ops::splat(12582912.0f), shifted = Ops::fma(x, Ops::splat(kLog2E), magic);
  const V n = shifted - magic;
  V r = Ops::fma(n, Ops::splat(-0.693359375f), x);  // n ln 2 in two parts, the first exact
  r = Ops::fma(n, Ops::splat(2.12194440e-4f), r);
  const I power = (reinterpret_cast<I>(shifted) - (0x4b400000 - 127)) << 23;
  const V y = exp2_series<Ops, 6>(r * kLog2E) * reinterpret_cast<V>(power);
  return x < -87.336540f ? V{} : y;
}

// The same lane after lane, for fp64.
template <class V>
__attribute__((always_inline)) inline V exp_by_lanes(V x) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace
}  // namespace kdfast::cpu
