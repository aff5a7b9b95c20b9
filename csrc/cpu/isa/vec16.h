// SPDX-License-Identifier: Apache-2.0
// Sixteen floats and a mask of them, for the instruction set of the including file.
//
// What the attention kernels are written in. Vec16 has + - * /; Dwords16 are 16 dwords of a packed
// form, and a Mask16 selects some of the first lanes, all or none:
//   splat16, zero16, fma16 (a b + c), fms16 (a b - c), max16, round16, scale16 (a 2^b), sum16,
//   top16 load16 and store16 of floats, and of any element type under a mask tail_mask,
//   all_or_none, both; keep16 puts zero where the mask is not, max16 leaves a as it is rounded: to
//   the precision of an element type transpose16 of 16 x 16 dwords
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
#include "cpu/isa/vec16_avx512.h"
#else
#include "cpu/isa/vec16_avx2.h"
#endif

namespace kdfast::cpu {
namespace {

constexpr int64_t kPanel = kWide * kVector;

inline int64_t divide_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Polynomials for 2^f on [-0.5, 0.5].
template <int kDegree>
inline Vec16 exp2_poly(Vec16 f);
template <>
inline Vec16 exp2_poly<3>(Vec16 f) {  // relative error 7.5e-5
  Vec16 p = fma16(splat16(0.0551716695f), f, splat16(0.242611125f));
  p = fma16(p, f, splat16(0.693260986f));
  return fma16(p, f, splat16(0.999928073f));
}
template <>
inline Vec16 exp2_poly<6>(Vec16 f) {  // relative error 1.9e-9
  Vec16 p = fma16(splat16(0.000153458121f), f, splat16(0.00133999313f));
  p = fma16(p, f, splat16(0.00961848896f));
  p = fma16(p, f, splat16(0.0555032878f));
  p = fma16(p, f, splat16(0.240226469f));
  p = fma16(p, f, splat16(0.693147206f));
  return fma16(p, f, splat16(1.0f));
}

// Of a finite x; a large negative one gives zero.
template <int kDegree>
inline Vec16 exponential(Vec16 x) {
  const Vec16 y = x * splat16(1.44269504088896341f), r = round16(y);
  return scale16(exp2_poly<kDegree>(y - r), r);
}

// The same, also where x is -inf.
template <int kDegree>
inline Vec16 masked_exponential(Vec16 x) {
  return exponential<kDegree>(max16(splat16(-1e4f), x));
}

}  // namespace
}  // namespace kdfast::cpu
