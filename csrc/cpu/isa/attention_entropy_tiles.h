// SPDX-License-Identifier: Apache-2.0
// Entropy of the attention's rows over the products M.
#pragma once
#include "cpu/isa/attention_distill_scores.h"
#include "cpu/isa/attention_entropy.h"

namespace kdfast::cpu {
namespace {

// Entropy of softmax over n scores times `scale`, and `pads` logits of 0.
inline float tile_entropy(float* s, int64_t n, float scale, int64_t pads) {
  const float peak = peak_of(s, n, pads > 0), top = peak * scale;
  const Anchor anchor = anchor_of(peak, scale, 1);
  center_scores(s, n, anchor.center);
  const Vec16 factor = splat16(scale * kLog2e), offset = splat16(anchor.offset);
  // With x = s - top: H = log z - sum(exp(x) x) / z, in which nothing cancels, for x <= 0.
  Vec16 sums = zero16(), means = zero16();
  for (int64_t j = 0; j < n; j += kVector) {
    const Vec16 x = fms16(load16(s + j), factor, offset);
    const Vec16 e = keep16(tail_mask(n - j), exp2_16<6>(x));
    sums = sums + e;
    means = fma16(e, x, means);
  }
  const double pad = pads > 0 ? double(pads) * exp(-double(top)) : 0;
  const double z = double(sum16(sums)) + pad;
  const double mean = double(sum16(means)) * kLn2 - pad * double(top);
  return static_cast<float>(log(z) - mean / z);
}

template <class M>
void tile_entropies(const ScoreSide<float>& side, const WindowSpan& span, float* out,
                    char* scratch) {
  [[maybe_unused]] const typename M::Session session;
  ScoreStrip<M> strip(side, span, scratch);
  strip.pack_keys();
  Walk query(span, 0), result = query;
  for (int64_t i = 0; i < strip.n; i += M::kRows) {
    const int64_t count = strip.n - i < M::kRows ? strip.n - i : M::kRows;
    strip.score(query, count);
    for (int64_t r = 0; r < count; ++r, result.next())
      out[result.token()] =
          tile_entropy(strip.scores + r * strip.step, strip.n, fabsf(side.scale), span.pads);
  }
}

// For q and k of any element type but f64; of bf16 only, where M has products in bf16.
template <class M>
constexpr EntropyKernel<float> entropy_tiles() {
  return {&ScoreStrip<M>::bytes, &tile_entropies<M>};
}

}  // namespace
}  // namespace kdfast::cpu
