// SPDX-License-Identifier: Apache-2.0
// Forward of one head, over the products M: RegisterTiles of register_tiles.h, or the AmxTiles of
// amx_tiles.h.
//
// Whole rows of scores of a few queries stay in L1 or L2, so the softmax needs one pass and no
// rescaling.
#pragma once
#include "cpu/isa/attention_packing.h"
#include "cpu/isa/pruned_attention.h"

namespace kdfast::cpu {
namespace {

// Sizes in dwords of the packed forms of one head.
template <class M>
struct Sizes {
  int64_t dim, steps, width, columns;

  explicit Sizes(int64_t d)
      : dim(d),
        steps(round_up(divide_up(d, M::kPair), M::kUnit)),
        width(packed_width<M>(d)),
        columns(round_up(d, kVector)) {}
  int64_t lanes(int64_t n) const { return round_up(n, kVector) * steps; }
  int64_t pairs(int64_t n) const { return round_up(n, M::kTokens) / M::kPair * columns; }
  // Zero rows at the end of a pairs form, of which packing may leave out some.
  void clear_tail(int64_t n, int32_t* out) const {
    constexpr int64_t kRest = M::kTokens - kVector;
    if constexpr (kRest > 0) {
      const int64_t dwords = M::kTokens / M::kPair * columns;
      std::memset(out + pairs(n) - dwords, 0, dwords * 4);
    }
  }
  // A row of n weights; the odd stride keeps rows from sharing cache sets.
  static int64_t row(int64_t n) { return round_up(n, 2 * kVector) / M::kPair + kVector; }
};

// Weights are exp(c * score - top), with top = c * (largest score). The exponent is one FMA, which
// does not round c * score, but top is rounded. So at the largest score the exponent is not 0, it
// is the rounding error of top, which grows with top and would overflow exp for tops near 2^31.
// Beyond this size of top, the largest score is subtracted first, which is exact where scores are
// close, and c multiplies the difference.
constexpr float kFarTop = 1 << 12;
// x -= center for n scores.
inline void center_scores(float* x, int64_t n, float center) {
  if (center == 0) return;
  for (int64_t j = 0; j < n; ++j) x[j] -= center;
}

template <class T, class M>
struct Forward {
  const AttentionHead<float>& head;
  const Sizes<M> size{head.dim};
  const int64_t n = span_tokens(head.span);
  const int64_t vectors = divide_up(n, kVector), stride = Sizes<M>::row(n);
  const int64_t strip = round_up(n, kVector) + kVector;
  static constexpr int64_t kBlock = M::kRows > kVector ? M::kRows : kVector;
  int32_t *keys, *values, *block, *p;
  float *buffer, *scores, *sums;
  float total[M::kRows], pads[M::kRows];

  static int64_t bytes(int64_t n, int64_t dim) {
    const Sizes<M> s(dim);
    const int64_t dwords = s.lanes(n) + s.pairs(n) + kBlock * s.width + M::kRows * s.row(n) +
                           s.width * M::kPair +
                           M::kRows * (round_up(n, kVector) + kVector + s.columns);
    return dwords * 4 + 7 * 64;
  }

  Forward(const AttentionHead<float>& h, char* scratch) : head(h) {
    keys = take<int32_t>(scratch, size.lanes(n));
    values = take<int32_t>(scratch, size.pairs(n));
    block = take<int32_t>(scratch, kBlock * size.width);
    p = take<int32_t>(scratch, M::kRows * stride);
    buffer = take<float>(scratch, size.width * M::kPair);
    scores = take<float>(scratch, M::kRows * strip);
    sums = take<float>(scratch, M::kRows * size.columns);
  }

  __attribute__((noinline)) void pack() {
    const Reading rotated{head.dim, &head.table, 1.0f}, plain{head.dim, nullptr, 1.0f};
    const T* k = static_cast<const T*>(head.k.data);
    const T* v = static_cast<const T*>(head.v.data);
    Walk key(head.span, 0), value(head.span, 0);
    size.clear_tail(n, values);
    for (const Rows& rows : {head.k, head.v, head.q}) fetch_first<T>(rows, head.span, head.dim);
    for (int64_t first = 0; first < n; first += kVector) {
      const int64_t count = n - first < kVector ? n - first : kVector;
      pack_rows<T, M>(k, head.k.step, key, count, kVector, rotated, buffer, block);
      to_lanes(block, size.width, first, vectors * kVector, size.steps, keys);
      pack_rows<T, M>(v, head.v.step, value, count, kVector, plain, buffer, block);
      M::to_pairs(block, size.width, kVector, size.columns, values, first);
    }
  }

  // Scores of the first `count` queries in `block` against all keys.
  void score(int64_t count) {
    for (int64_t first = 0; first < vectors; first += kWide) {
      const int64_t wide = vectors - first < kWide ? vectors - first : kWide;
      M::scores(block, size.width, count, keys + first * kVector * size.steps, wide * kVector,
                size.steps, scores + first * kVector, strip);
    }
  }

  // c * score + bias in place of the scores of query i; c is |scale|. Returns what lse is counted
  // from.
  float add_bias(int r, int64_t i, float c) {
    float* to = scores + r * strip;
    const float* bias = head.bias.data + i * head.bias.step;
    const Vec16 factor = splat16(c);
    Vec16 largest = splat16(-INFINITY);
    for (int64_t j = 0; j < n; j += kVector) {
      const Mask16 m = tail_mask(n - j);
      const Vec16 b = load16(bias + j, m);
      largest = max16(m, largest, b);
      store16(to + j, fma16(load16(to + j), factor, b));
    }
    return row_base(top16(largest));
  }

  // What the weights of a row are counted from: its largest c * score.
  template <bool kBiased>
  float largest(int r, float c) const {
    const float* from = scores + r * strip;
    Vec16 top = splat16(-INFINITY);
    for (int64_t v = 0; v + 1 < vectors; ++v) top = max16(top, load16(from + v * kVector));
    const Mask16 last = tail_mask(n - (vectors - 1) * kVector);
    top = max16(last, top, load16(from + (vectors - 1) * kVector));
    const float m = top16(top) * c;
    return (head.span.pads && m < 0) || (kBiased && m == -INFINITY) ? 0.0f : m;
  }

  // Scores of row r become weights exp(c * score - m), not yet normalised. kBiased: c is 1, and
  // scores may be -inf.
  template <bool kBiased>
  void weigh(int r, float c, float m) {
    const bool far = !kBiased && fabsf(m) > kFarTop;
    if (far) center_scores(scores + r * strip, n, largest<false>(r, 1.0f));
    const float* from = scores + r * strip;
    const Mask16 last = tail_mask(n - (vectors - 1) * kVector);
    const Vec16 offset = splat16(far ? 0.0f : -m), factor = splat16(c);
    int32_t* to = p + r * stride;
    Vec16 sum = zero16();
    const auto weight = [&](int64_t v) {
      const Vec16 x = fma16(load16(from + v * kVector), factor, offset);
      return kBiased ? masked_exponential<M::kDegree>(x) : exponential<M::kDegree>(x);
    };
    int64_t v = 0;
    for (; v + 2 < vectors; v += 2) {
      const Vec16 a = weight(v), b = weight(v + 1);
      sum = sum + (a + b);
      M::store2(to + v * kVector / M::kPair, a, b);
    }
    const bool two = v + 2 == vectors;
    const Vec16 a = keep16(two ? tail_mask(kVector) : last, weight(v));
    const Vec16 b = two ? keep16(last, weight(v + 1)) : zero16();
    sum = sum + (a + b);
    M::store2(to + v * kVector / M::kPair, a, b);
    pads[r] = head.span.pads ? head.span.pads * expf(-m) : 0.0f;
    total[r] = sum16(sum) + pads[r];
  }

  // The softmax of `count` rows from query i on. Row by row, every reduction would be waited for.
  // Not inlined, here and elsewhere: a profile then tells the phases apart, at no cost.
  template <bool kBiased>
  __attribute__((noinline)) void weigh_rows(int64_t count, int64_t i, float c, Walk& walk,
                                            float* lse) {
    float bases[M::kRows], tops[M::kRows];
    for (int r = 0; r < count; ++r) {
      bases[r] = kBiased ? add_bias(r, i + r, c) : 0.0f;
      tops[r] = largest<kBiased>(r, kBiased ? 1.0f : c);
    }
    for (int r = 0; r < count; ++r) weigh<kBiased>(r, kBiased ? 1.0f : c, tops[r]);
    for (int r = 0; r < count; ++r, walk.next()) {
      float* to = lse + walk.token();
      *to = tops[r] - bases[r] + logf(total[r]);
      if (!kBiased || total[r] != 0) continue;
      // No score is finite: all weights are zero, here and in the backward.
      total[r] = 1;
      *to = INFINITY;
    }
  }

  __attribute__((noinline)) void apply(int64_t count, T* const* out) {
    M::weighted(p, stride, count, values, size.columns, divide_up(n, M::kPair), sums, false);
    for (int r = 0; r < count; ++r) {
      const Vec16 share = splat16(1.0f / total[r]), pad = splat16(pads[r]);
      for (int64_t d = 0; d < head.dim; d += kVector) {
        const Mask16 m = tail_mask(head.dim - d);
        Vec16 o = load16(sums + r * size.columns + d);
        if (head.span.pads) o = fma16(pad, load16(head.pad + d, m), o);
        store16(out[r] + d, m, o * share);
      }
    }
  }

  void run(int64_t begin, int64_t end, MutableRows to, float* lse) {
    [[maybe_unused]] const typename M::Session session;
    pack();
    const float c = fabsf(head.scale);
    const Reading how{head.dim, &head.table, head.scale < 0 ? -1.0f : 1.0f};
    const T* q = static_cast<const T*>(head.q.data);
    Walk query(head.span, begin), result(head.span, begin);
    for (int64_t i = begin; i < end; i += M::kRows) {
      const int64_t count = end - i < M::kRows ? end - i : M::kRows;
      pack_rows<T, M>(q, head.q.step, query, count, M::kRows, how, buffer, block);
      T* out[M::kRows];
      Walk row = result;
      for (int r = 0; r < count; ++r, row.next()) {
        out[r] = static_cast<T*>(to.data) + row.token() * to.step;
        fetch_row(out[r], head.dim);
      }
      score(count);
      if (head.bias.data == nullptr)
        weigh_rows<false>(count, i, c, result, lse);
      else
        weigh_rows<true>(count, i, c, result, lse);
      apply(count, out);
    }
  }
};

}  // namespace
}  // namespace kdfast::cpu
