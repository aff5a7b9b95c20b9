// SPDX-License-Identifier: Apache-2.0
// Packed forms of a head's rows, and the arithmetic of products of fp32.
//
// Packed data is handled in dwords: one fp32, or two bf16 that are neighbours along the sum of a
// product. So one tile function serves both: broadcast a dword of A, multiply by 16 dwords of B.
//   rows   (row, dword of D)           A operand of a product that sums over D
//   lanes  (panel, dword of D, row)    B operand of a product that sums over D
//   pairs  (kPair rows, D)             B operand of a product that sums over rows
// SplitMath of split_math.h makes two bf16 of a value: of 32 elements along the sum, 16 dwords of
// upper parts and then 16 of lower ones.
// Included by files compiled for one instruction set only, hence the anonymous namespace.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "cpu/isa/pruned_attention.h"
#include "cpu/isa/vec16.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kAhead = 16;  // rows from an access to its prefetch

// The arithmetic of fp32; Bf16Math of bf16_math.h and SplitMath are the other ones.
struct Fp32Math {
  static constexpr int64_t kPair = 1;         // elements for each dword of a packed form
  static constexpr bool kNeighbours = false;  // a dword holds neighbours along the sum
  static constexpr int64_t kWidth = kVector;  // dwords of a packed row come in multiples of it
  static constexpr int kDegree = 6;
  static Vec16 multiply_add(Vec16 sum, Dwords16 a, Dwords16 b) {
    return fma16(as_floats(a), as_floats(b), sum);
  }
  // Writes 16 values as the elements of a packed row from d on, or 32 from `to` on.
  static void store(int32_t* row, int64_t d, Vec16 x) { store16(row + d, x); }
  static void store2(int32_t* to, Vec16 x, Vec16 y) {
    store16(to, x);
    store16(to + kVector, y);
  }
  // A row as packed elements.
  template <class T>
  static void copy_row(const T* in, int64_t dim, int32_t* out) {
    for (int64_t d = 0; d < dim; d += kVector) store16(out + d, load16(in + d, tail_mask(dim - d)));
  }
  // `count` packed rows (an even number) become those from `first` on of a pairs form of `columns`
  // dwords.
  static void to_pairs(const int32_t* rows, int64_t width, int64_t count, int64_t columns,
                       int32_t* out, int64_t first = 0) {
    for (int64_t r = 0; r < count; ++r)
      std::memcpy(out + (first + r) * columns, rows + r * width, columns * 4);
  }
};

// Token and table row of a window's tokens, one after the other.
struct Walk {
  const WindowSpan& span;
  int64_t run, column;

  Walk(const WindowSpan& s, int64_t i) : span(s), run(i / s.length), column(i % s.length) {}
  int64_t index() const { return run * span.length + column; }
  int64_t token() const { return span.first + run * span.token_step + column; }
  int64_t table_row() const { return run * span.table_step + column; }
  void next() {
    if (++column == span.length) column = 0, ++run;
  }
};

// y = R x, or R^T x if kInverse, for one row of fp32; x and y have room for whole vectors.
template <bool kInverse>
inline void rotate(const RotaryTable<float>& t, int64_t table_row, int64_t dim, float* x) {
  if (t.cos == nullptr || table_row < t.prefix) return;
  if (!t.interleaved) return rotate_row(t, table_row, dim, kInverse, x);
  const float* c = t.cos + (table_row - t.skipped) * dim;
  const float* s = t.sin + (table_row - t.skipped) * dim;
  for (int64_t d = 0; d < dim; d += kVector) {
    const Mask16 m = tail_mask(dim - d);
    const Vec16 sine = load16(s + d, m), cosine = load16(c + d, m);
    store16(x + d, rotate16<kInverse>(load16(x + d), cosine, sine));
  }
}

// Starts to bring a row into the caches: rows of one head lie up to a page apart, where the
// hardware does not prefetch.
template <class T>
inline void fetch_row(const T* row, int64_t dim) {
  for (int64_t b = 0; b < dim * static_cast<int64_t>(sizeof(T)); b += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + b);
}

// The same for the first rows of a span; the others are fetched while these are packed. In a short
// span it would cost more than it saves.
template <class T>
inline void fetch_first(const Rows& rows, const WindowSpan& span, int64_t dim) {
  if (span_tokens(span) < 4 * kAhead) return;
  Walk walk(span, 0);
  for (int64_t r = 0; r < kAhead; ++r, walk.next())
    fetch_row(static_cast<const T*>(rows.data) + walk.token() * rows.step, dim);
}

// How a head's rows are read: rotated or not, and with the sign of the scale.
struct Reading {
  int64_t dim;
  const RotaryTable<float>* table;  // null: not rotated
  float sign;
};

// Dwords of a packed row of D elements.
template <class M>
inline int64_t packed_width(int64_t dim) {
  return divide_up(dim, M::kWidth * M::kPair) * M::kWidth;
}

// One row as packed elements, zero beyond D up to packed_width.
template <class T, class M>
inline void pack_row(const T* in, int64_t table_row, const Reading& how, float* buffer,
                     int32_t* out) {
  const bool turn =
      how.table != nullptr && how.table->cos != nullptr && table_row >= how.table->prefix;
  if (!turn && how.sign == 1.0f) return M::copy_row(in, how.dim, out);
  for (int64_t d = 0; d < how.dim; d += kVector)
    store16(buffer + d, load16(in + d, tail_mask(how.dim - d)));
  if (turn) rotate<false>(*how.table, table_row, how.dim, buffer);
  const Vec16 sign = splat16(how.sign);
  const int64_t padded = packed_width<M>(how.dim) * M::kPair;
  for (int64_t d = 0; d < padded; d += kVector) {
    const Vec16 x = d < how.dim ? rounded(load16(buffer + d) * sign, in) : zero16();
    const Mask16 m = tail_mask(how.dim - d > 0 ? how.dim - d : 0);
    M::store(out, d, keep16(m, x));
  }
}

// `count` rows from `walk` on, then zero rows up to `padded`.
template <class T, class M>
inline void pack_rows(const T* base, int64_t step, Walk& walk, int64_t count, int64_t padded,
                      const Reading& how, float* buffer, int32_t* out) {
  const int64_t width = packed_width<M>(how.dim);
  Walk ahead(walk.span, walk.index() + kAhead);
  for (int64_t r = 0; r < count; ++r, walk.next(), ahead.next()) {
    fetch_row(base + ahead.token() * step, how.dim);
    pack_row<T, M>(base + walk.token() * step, walk.table_row(), how, buffer, out + r * width);
  }
  if (padded > count) std::memset(out + count * width, 0, (padded - count) * width * 4);
}

// 16 packed rows (from row `first` of `total` padded to whole vectors) into the lanes form, whose
// panels are kWide vectors wide, the last one narrower.
inline void to_lanes(const int32_t* rows, int64_t width, int64_t first, int64_t total,
                     int64_t steps, int32_t* out) {
  const int64_t panel = first / kPanel * kPanel;
  const int64_t lanes = total - panel < kPanel ? total - panel : kPanel;
  int32_t* to = out + panel * steps + (first - panel);
  for (int64_t s = 0; s < steps; s += kVector)
    transpose16(rows + s, width, to + s * lanes, lanes, steps - s);
}

}  // namespace
}  // namespace kdfast::cpu
