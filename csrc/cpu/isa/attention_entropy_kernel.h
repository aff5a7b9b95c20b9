// SPDX-License-Identifier: Apache-2.0
// The kernels of attention_entropy.h for any CPU.
#pragma once
#include "cpu/isa/attention_distill_kernel.h"
#include "cpu/isa/attention_entropy.h"

namespace kdfast::cpu {
namespace {

// Entropy of softmax over n scores, which end in room for a whole vector, and `pads` logits of 0.
template <class A>
A row_entropy(A* s, int64_t n, int64_t pads) {
  const int64_t end = round_up(n, kWidth<A>);
  for (int64_t j = n; j < end; ++j) s[j] = kNever<A>;
  Vec<A> tops = load_vector(s);
  for (int64_t j = kWidth<A>; j < end; j += kWidth<A>) tops = max<A>(tops, load_vector(s + j));
  A top = largest<A>(tops);
  if (pads > 0 && top < 0) top = 0;
  // With x = s - top: H = log z - sum(exp(x) x) / z, in which nothing cancels, for x <= 0.
  Vec<A> sums{}, means{};
  for (int64_t j = 0; j < end; j += kWidth<A>) {
    const Vec<A> x = load_vector(s + j) - top, e = exp(x);
    sums += e;
    means += e * x;
  }
  double z = double(sum<A>(sums)), mean = double(sum<A>(means));
  if (pads > 0) {
    const double e = double(pads) * __builtin_exp(-double(top));
    z += e;
    mean -= e * double(top);
  }
  return A(__builtin_log(z) - mean / z);
}

template <class A>
int64_t entropy_bytes(int64_t n, int64_t d) {
  const int64_t values =
      2 * matrix_size<A>(n, d) + panels_size<A>(n, d) + matrix_size<A>(kQueries, n) + kRows;
  return values * static_cast<int64_t>(sizeof(A)) + 4 * 64;
}

template <class A>
void entropy_rows(const ScoreSide<A>& side, const WindowSpan& span, A* out, char* scratch) {
  const int64_t n = span_tokens(span), stride = row_stride<A>(n);
  const int64_t block = n > kManyKeys ? kFewQueries : kQueries;
  const Scores<A> scores(side, span, scratch);
  A* s = take<A>(scratch, matrix_size<A>(kQueries, n));
  for (int64_t i = 0; i < n; i += block) {
    const int64_t rows = n - i < block ? n - i : block;
    scores.tile(i, rows, 0, n, s, stride);
    for (int64_t r = 0; r < rows; ++r)
      out[span_token(span, i + r)] = row_entropy<A>(s + r * stride, n, span.pads);
  }
}

template <class A>
constexpr EntropyKernel<A> entropy_kernel() {
  return {&entropy_bytes<A>, &entropy_rows<A>};
}

}  // namespace
}  // namespace kdfast::cpu
