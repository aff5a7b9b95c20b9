// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of pruned_attention compute. See docs/ops/pruned_attention.md.
#pragma once
#include <cstdint>

#include "cpu/attention_geometry.h"
#include "cpu/isa/elements.h"

namespace kdfast::cpu {

// Rows of one head, (tokens, D) with contiguous D; `step` elements from a token to the next.
struct Rows {
  const void* data;
  int64_t step;
};
struct MutableRows {
  void* data;
  int64_t step;
};

// Added to the scores of one head: (queries, keys), `step` elements from a query to the next.
template <class A>
struct Bias {
  const A* data;  // null: none
  int64_t step;
};

// One head of one image inside one window. A: float, or double for f64.
template <class A>
struct AttentionHead {
  Rows q, k, v;
  WindowSpan span;
  int64_t dim;
  A scale;
  RotaryTable<A> table;
  const A* pad;  // (D,) value of the span.pads padded keys
  Bias<A> bias;  // in a call without windows
};

template <class A>
struct AttentionGrad {
  Rows grad, out;
  const A* lse;  // per token, as the forward gave it; see row_base
  MutableRows dq, dk, dv;
  A* dpad;   // (D,), added to
  A* dbias;  // (keys, bias_columns(tokens)), added to: transposed; null if not wanted
};

// Kernels of one element type; queries [begin, end) are positions inside the window, and `scratch`
// is 64-byte aligned.
template <class A>
struct AttentionKernel {
  int64_t (*forward_bytes)(int64_t tokens, int64_t dim);
  void (*forward)(const AttentionHead<A>& head, int64_t begin, int64_t end, MutableRows out, A* lse,
                  char* scratch);
  int64_t (*backward_bytes)(int64_t tokens, int64_t dim);
  // Writes dq of the queries, adds to dpad, and adds the queries' share of dk and dv to
  // sums (2, sum_rows(tokens), sum_columns(D)), chunk after chunk, or starts them if `first`.
  void (*backward)(const AttentionHead<A>& head, const AttentionGrad<A>& grad, int64_t begin,
                   int64_t end, bool first, A* sums, char* scratch);
  // Writes dk and dv from `count` sums, which it adds up in order into the first.
  void (*backward_keys)(const AttentionHead<A>& head, const AttentionGrad<A>& grad, A* sums,
                        int64_t count);
};

constexpr int64_t kLanes = 16;
constexpr int64_t kSumRows = 48;
constexpr int64_t kMaxQueryChunk = 320;

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
// Takes `count` elements off the scratch memory, 64-byte aligned.
template <class A>
static inline A* take(char*& scratch, int64_t count) {
  A* out = reinterpret_cast<A*>(scratch);
  scratch += round_up(count * static_cast<int64_t>(sizeof(A)), 64);
  return out;
}

static inline int64_t sum_columns(int64_t dim) { return round_up(dim, kLanes); }
static inline int64_t bias_columns(int64_t tokens) { return round_up(tokens, kLanes); }
static inline int64_t sum_rows(int64_t tokens) { return round_up(tokens, kSumRows); }

// Queries that the backward takes at a time. It depends on the window alone, and a chunk's share of
// dk and dv is summed up from zero, so splitting chunks over threads changes no bit.
static inline int64_t query_chunk(int64_t tokens) {
  if (tokens < 1) return 0;
  const int64_t chunks = (tokens + kMaxQueryChunk - 1) / kMaxQueryChunk;
  return round_up((tokens + chunks - 1) / chunks, 2 * kLanes);
}

// What a row's lse is counted from in a call with a bias: the row's largest bias, or 0 if that is
// -inf. lse is the logarithm of the sum of exp(score - base), so masks of any size cost it no
// digits. It is infinite in a row without a finite score, which makes P zero there.
template <class A>
static inline A row_base(A largest) {
  return largest == -__builtin_huge_val() ? A(0) : largest;
}

}  // namespace kdfast::cpu
