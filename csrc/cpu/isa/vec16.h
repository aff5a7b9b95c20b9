// SPDX-License-Identifier: Apache-2.0
// Sixteen floats and a mask of them, for the instruction set of the including file.
//
// What the attention kernels are written in. Vec16 has + - * /; Dwords16 are 16 dwords of a packed
// form, and a Mask16 selects some of the first lanes, all or none:
//
// clang-format off
//   splat16, zero16        all lanes x, or 0
//   fma16, fms16           a b + c, a b - c
//   max16, round16         largest of two; nearest integer
//   scale16                a 2^b
//   sum16, top16           sum and largest of the lanes
//   load16, store16        of floats, and of any element type under a mask
//   tail_mask              the first lanes, up to a count
//   all_or_none, both      all lanes or none; lanes of two masks
//   keep16, max16 (mask)   zero, or a as it is, in lanes that the mask leaves out
//   rounded                to the precision of an element type
//   rotate16               neighbours as pairs, by a rotary table
//   transpose16            16 x 16 dwords
// clang-format on
#pragma once
#include <cstdint>

#include "cpu/isa/exponential.h"
#if defined(__AVX512F__)
#include "cpu/isa/vec16_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "cpu/isa/vec16_avx2.h"
#else
#include "cpu/isa/vec16_portable.h"
#endif

namespace kdfast::cpu {
namespace {

constexpr int64_t kPanel = kWide * kVector;

inline int64_t divide_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

struct Vec16Ops {
  using V = Vec16;
  static V splat(float x) { return splat16(x); }
  static V fma(V a, V b, V c) { return fma16(a, b, c); }
};

// 2^f for f in [-0.5, 0.5].
template <int kDegree>
inline Vec16 exp2_poly(Vec16 f) {
  return exp2_series<Vec16Ops, kDegree>(f);
}

// e^x of a finite x; a large negative one gives zero.
template <int kDegree>
inline Vec16 exponential(Vec16 x) {
  const Vec16 y = x * splat16(kLog2e), r = round16(y);
  return scale16(exp2_poly<kDegree>(y - r), r);
}

// The same, also where x is -inf.
template <int kDegree>
inline Vec16 masked_exponential(Vec16 x) {
  return exponential<kDegree>(max16(splat16(-1e4f), x));
}

}  // namespace
}  // namespace kdfast::cpu
