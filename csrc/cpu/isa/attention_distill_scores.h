// SPDX-License-Identifier: Apache-2.0
// Packed rows of q and k of any element type, and strips of their scores over the products M.
#pragma once
#include "cpu/isa/attention_distill.h"
#include "cpu/isa/pruned_attention_forward.h"

namespace kdfast::cpu {
namespace {

constexpr float kLn2 = 0.69314718055994531f;

// 2^y of any finite y. Always inlined, as all that takes vectors: a call would pass them in memory.
template <int kDegree>
__attribute__((always_inline)) inline Vec16 exp2_16(Vec16 y) {
  const Vec16 r = round16(y);
  return scale16(exp2_poly<kDegree>(y - r), r);
}

// exponential<6>, but the error does not grow with x.
inline Vec16 exact_exponential(Vec16 x) {
  const Vec16 log2e = splat16(kLog2e), y = max16(x, splat16(-1e6f)), r = round16(y * log2e);
  return scale16(exp2_poly<6>(fms16(y, log2e, r)), r);
}

// The arithmetic that attention_distill_terms.h asks for; exp of x <= 0.
struct TileMath {
  using V = Vec16;
  static V splat(double x) { return splat16(static_cast<float>(x)); }
  static V exp(V x) { return exponential<6>(x); }
  static V larger(V a, V b) { return max16(a, b); }
  // log(1 + x): twice artanh of z = x / (2 + x) <= 1/3, whose series ends early.
  static V log1p(V x) {
    const V z = x / (x + splat16(2.0f)), w = z * z;
    V y = fma16(w, splat16(1 / 15.0f), splat16(1 / 13.0f));
    y = fma16(y, w, splat16(1 / 11.0f));
    y = fma16(y, w, splat16(1 / 9.0f));
    y = fma16(y, w, splat16(1 / 7.0f));
    y = fma16(y, w, splat16(1 / 5.0f));
    y = fma16(y, w, splat16(1 / 3.0f));
    return splat16(2.0f) * fma16(z * w, y, z);
  }
};

// The sign of a scale goes with the queries.
inline Reading reading_of(const ScoreSide<float>& side, bool query) {
  return {side.dim, &side.table, query && side.scale < 0 ? -1.0f : 1.0f};
}

// pack_rows of queries or keys, of any element type that M takes.
template <class M>
void pack_side(const ScoreSide<float>& side, bool query, Walk& walk, int64_t count, int64_t padded,
               float* buffer, int32_t* out) {
  const Rows& x = query ? side.q : side.k;
  const Reading how = reading_of(side, query);
  const auto pack = [&]<class T>(T) {
    pack_rows<T, M>(static_cast<const T*>(x.data), x.step, walk, count, padded, how, buffer, out);
  };
  switch (side.element) {
    case Element::bf16: return pack(Bf16());
    case Element::f16: return pack(Half());
    default: return pack(float());
  }
}

// Scores of one side, M::kRows queries against all keys of the window at a time.
template <class M>
struct ScoreStrip {
  const ScoreSide<float>& side;
  const WindowSpan& span;
  const Sizes<M> size{side.dim};
  const int64_t n = span_tokens(span), vectors = divide_up(n, kVector);
  const int64_t step = strip_of(n);  // from a row to the next
  static constexpr int64_t kBlock = M::kRows > kVector ? M::kRows : kVector;
  int32_t *keys, *block;
  float *buffer, *scores;

  static int64_t strip_of(int64_t n) { return round_up(n, kVector) + kVector; }
  static int64_t bytes(int64_t n, int64_t dim) {
    const Sizes<M> s(dim);
    const int64_t dwords =
        s.lanes(n) + kBlock * s.width + s.width * M::kPair + M::kRows * strip_of(n);
    return dwords * 4 + 4 * 64;
  }

  ScoreStrip(const ScoreSide<float>& x, const WindowSpan& w, char* scratch) : side(x), span(w) {
    keys = take<int32_t>(scratch, size.lanes(n));
    block = take<int32_t>(scratch, kBlock * size.width);
    buffer = take<float>(scratch, size.width * M::kPair);
    scores = take<float>(scratch, M::kRows * step);
  }

  void pack_keys() {
    Walk key(span, 0);
    for (int64_t first = 0; first < n; first += kVector) {
      const int64_t count = n - first < kVector ? n - first : kVector;
      pack_side<M>(side, false, key, count, kVector, buffer, block);
      to_lanes(block, size.width, first, vectors * kVector, size.steps, keys);
    }
  }

  // Scores of the next `count` queries.
  void score(Walk& query, int64_t count) {
    pack_side<M>(side, true, query, count, M::kRows, buffer, block);
    for (int64_t first = 0; first < vectors; first += kWide) {
      const int64_t wide = vectors - first < kWide ? vectors - first : kWide;
      M::scores(block, size.width, count, keys + first * kVector * size.steps, wide * kVector,
                size.steps, scores + first * kVector, step);
    }
  }
};

// The largest of n scores; `pads`: also of 0.
inline float peak_of(const float* x, int64_t n, bool pads) {
  const int64_t vectors = divide_up(n, kVector);
  Vec16 top = splat16(-INFINITY);
  for (int64_t v = 0; v + 1 < vectors; ++v) top = max16(top, load16(x + v * kVector));
  const Mask16 last = tail_mask(n - (vectors - 1) * kVector);
  const float peak = top16(max16(last, top, load16(x + (vectors - 1) * kVector)));
  return pads && peak < 0 ? 0 : peak;
}

// How scores x up to a peak become x c - peak c, c = scale * log2(e): by the product less `offset`.
// What the rounding of the offset leaves at the peak is the same for all and drops out of P, but it
// grows with the peak and at 2^31 is an exponent that fp32 has not. So a large peak is taken from x
// itself, as `center`: the difference is exact near the peak, where it matters.
struct Anchor {
  float center, offset;
};
inline Anchor anchor_of(float peak, float scale, float inv_temperature) {
  const float top = peak * scale, size = fabsf(top);
  // The attention itself is thus the same at any temperature that anybody would take.
  const bool far = size > kFarTop || size * inv_temperature > kFarTop * kFarTop;
  return {far ? peak : 0, far ? 0 : top * kLog2e};
}
// That of the teacher's scores where they are compared themselves: equal ones differ by zero.
inline Anchor same_anchor(Anchor student, float peak, float scale, float teacher_scale) {
  return scale == teacher_scale ? student : Anchor{0, peak * scale * kLog2e};
}

}  // namespace
}  // namespace kdfast::cpu
