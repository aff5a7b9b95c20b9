// SPDX-License-Identifier: Apache-2.0
// Where the tokens of an attention call lie: windows of a grid, padded tokens, rotary tables.
//
// Files in isa/ include this too. So: plain data, and functions that are static, for an inline
// function compiled there for AVX-512 could become the library's only copy of it.
#pragma once
#include <cstdint>

namespace kdfast::cpu {

// Row-major tokens, cut into size x size windows; size >= 1. Without windows: {1, N, N}, one window
// of one run.
struct TokenGrid {
  int64_t rows, cols, size;
};

// The real tokens of one window, in order: `runs` runs of `length` consecutive tokens.
struct WindowSpan {
  int64_t first;  // token in the top left corner
  int64_t runs, length;
  int64_t token_step;  // tokens from the start of a run to the start of the next
  int64_t table_step;  // the same in rows of a rotary table
  int64_t pads;        // padded tokens that are keys of logit 0
};

// (rows, D) tables; cos is null if nothing is rotated. Row r of a token; see rotate_row.
template <class A>
struct RotaryTable {
  const A* cos;
  const A* sin;
  int64_t prefix;   // tokens in front that are not rotated
  int64_t skipped;  // rows that the tables leave out in front: 0 or prefix
  bool interleaved;
};

static inline int64_t window_count(const TokenGrid& g) {
  return ((g.rows + g.size - 1) / g.size) * ((g.cols + g.size - 1) / g.size);
}

// Window `index` in row-major order; border windows are cut off. `pad`: padded tokens are live.
static inline WindowSpan window_span(const TokenGrid& g, int64_t index, bool pad) {
  const int64_t across = (g.cols + g.size - 1) / g.size;
  const int64_t y = index / across * g.size, x = index % across * g.size;
  const int64_t runs = g.rows - y < g.size ? g.rows - y : g.size;
  const int64_t length = g.cols - x < g.size ? g.cols - x : g.size;
  return {y * g.cols + x, runs, length, g.cols, g.size, pad ? g.size * g.size - runs * length : 0};
}

static inline int64_t span_tokens(const WindowSpan& s) { return s.runs * s.length; }

// Token and table row of the window's i-th real token.
static inline int64_t span_token(const WindowSpan& s, int64_t i) {
  return s.first + i / s.length * s.token_step + i % s.length;
}
static inline int64_t span_table_row(const WindowSpan& s, int64_t i) {
  return i / s.length * s.table_step + i % s.length;
}

// Rotates one row x (D,) in place: R x, or R^T x if `inverse` (the gradient of R x).
template <class A>
static inline void rotate_row(const RotaryTable<A>& t, int64_t table_row, int64_t dim, bool inverse,
                              A* x) {
  if (t.cos == nullptr || table_row < t.prefix) return;
  const A* c = t.cos + (table_row - t.skipped) * dim;
  const A* s = t.sin + (table_row - t.skipped) * dim;
  const int64_t half = dim / 2;
  // The pair of channels is (i, i + gap); its two table columns may differ, so R is no pure
  // rotation and the gradient needs R^T, not R^-1.
  const int64_t step = t.interleaved ? 2 : 1, gap = t.interleaved ? 1 : half;
  for (int64_t p = 0; p < half; ++p) {
    const int64_t i = p * step, j = i + gap;
    const A a = x[i], b = x[j];
    x[i] = inverse ? a * c[i] + b * s[j] : a * c[i] - b * s[i];
    x[j] = inverse ? b * c[j] - a * s[i] : b * c[j] + a * s[j];
  }
}

}  // namespace kdfast::cpu
