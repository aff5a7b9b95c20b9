// SPDX-License-Identifier: Apache-2.0
// 2^f by one set of polynomials for all types of vectors in this folder.
// Included by files compiled for one instruction set only, hence the anonymous namespace.
#pragma once
#include <cstdint>

namespace kdfast::cpu {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

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

// Ops has V, splat(float) and fma(a, b, c) = a b + c.
template <class Ops, int kDegree>
__attribute__((always_inline)) inline typename Ops::V exp2_series(typename Ops::V f) {
  typename Ops::V p = Ops::splat(Exp2Terms<kDegree>::value[0]);
#pragma GCC unroll 8
  for (int i = 1; i <= kDegree; ++i) p = Ops::fma(p, f, Ops::splat(Exp2Terms<kDegree>::value[i]));
  return p;
}

// e^x, lane after lane.
template <class V>
__attribute__((always_inline)) inline V exp_by_lanes(V x) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace
}  // namespace kdfast::cpu
