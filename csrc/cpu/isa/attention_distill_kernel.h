// SPDX-License-Identifier: Apache-2.0
// The kernels of attention_distill.h for fp64, on any CPU.
#pragma once
#include <cstring>

#include "cpu/isa/attention_distill_rows.h"
#include "cpu/isa/elements.h"

namespace kdfast::cpu {
namespace {

// A block of queries' scores stays in L2: the forward holds whole rows of two score matrices, the
// backward a tile of three. All are multiples of kRows, and kKeys is one of every kPanelColumns.
constexpr int64_t kQueries = 48, kFewQueries = 24, kManyKeys = 768, kKeys = 384;
constexpr int64_t kAhead = 8;  // rows that are asked for before they are read

// Row stride of a matrix with `columns` columns: whole cache lines.
template <class A>
constexpr int64_t row_stride(int64_t columns) {
  return round_up(columns, 64 / static_cast<int64_t>(sizeof(A)));
}
// Values of a (rows, columns) matrix; a GEMM step may touch rows up to a multiple of kRows.
template <class A>
int64_t matrix_size(int64_t rows, int64_t columns) {
  return round_up(rows, kRows) * row_stride<A>(columns);
}
template <class A>
int64_t panels_size(int64_t rows, int64_t columns) {
  return round_up(rows, kPanelColumns<A>) * columns;
}

template <class A>
int64_t scratch_bytes(int64_t n, int64_t d, int64_t dt) {
  const int64_t inputs = 5 * matrix_size<A>(n, d) + 2 * matrix_size<A>(n, dt);
  const int64_t results = 3 * matrix_size<A>(n, d);
  const int64_t panels = 2 * panels_size<A>(n, d) + panels_size<A>(n, dt);
  const int64_t rows = 2 * matrix_size<A>(kQueries, n);
  const int64_t tiles = 3 * matrix_size<A>(kQueries, kKeys);
  // A GEMM over the columns of a tile may read kRows values past its end.
  const int64_t values = inputs + results + panels + (rows > tiles ? rows : tiles) + kRows;
  return values * static_cast<int64_t>(sizeof(A)) + 20 * 64;
}

template <class T, class A>
void load_rows_of(Rows rows, const WindowSpan& span, int64_t dim, const RotaryTable<A>* table,
                  A scale, A* out) {
  const int64_t n = span_tokens(span), ld = row_stride<A>(dim);
  const T* data = static_cast<const T*>(rows.data);
  for (int64_t i = 0; i < n; ++i) {
    const T* from = data + span_token(span, i) * rows.step;
    // Rows of one head lie a token of all heads apart: too far for the hardware to foresee.
    const T* later = data + span_token(span, i + kAhead < n ? i + kAhead : n - 1) * rows.step;
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(later + d);
    A* to = out + i * ld;
    for (int64_t d = 0; d < dim; ++d) to[d] = load<A>(from[d]);
    for (int64_t d = dim; d < ld; ++d) to[d] = 0;
    if (table == nullptr) continue;
    if (table->cos != nullptr) {
      rotate_row(*table, span_table_row(span, i), dim, false, to);
      for (int64_t d = 0; d < dim; ++d) to[d] = load<A>(store<T>(to[d]));
    }
    for (int64_t d = 0; d < dim; ++d) to[d] *= scale;
  }
  std::memset(out + n * ld, 0, (round_up(n, kRows) - n) * ld * sizeof(A));
}

// The window's rows as A, (n, row_stride(dim)), zeros behind; with a table: rotated, rounded to
// their own type and scaled.
template <class A>
A* load_rows(Rows rows, Element element, const WindowSpan& span, int64_t dim,
             const RotaryTable<A>* table, A scale, char*& scratch) {
  A* out = take<A>(scratch, matrix_size<A>(span_tokens(span), dim));
  switch (element) {
    case Element::f64: load_rows_of<double>(rows, span, dim, table, scale, out); break;
    case Element::f32: load_rows_of<float>(rows, span, dim, table, scale, out); break;
    case Element::bf16: load_rows_of<Bf16>(rows, span, dim, table, scale, out); break;
    case Element::f16: load_rows_of<Half>(rows, span, dim, table, scale, out); break;
  }
  return out;
}

template <class T, class A>
void store_rows_of(A* x, const WindowSpan& span, int64_t dim, const RotaryTable<A>* table, A scale,
                   MutableRows rows) {
  const int64_t n = span_tokens(span), ld = row_stride<A>(dim);
  for (int64_t i = 0; i < n; ++i) {
    A* from = x + i * ld;
    T* to = static_cast<T*>(rows.data) + span_token(span, i) * rows.step;
    if (table != nullptr) {
      for (int64_t d = 0; d < dim; ++d) from[d] *= scale;
      rotate_row(*table, span_table_row(span, i), dim, true, from);
    }
    for (int64_t d = 0; d < dim; ++d) to[d] = store<T>(from[d]);
  }
}

// The way back: scaled and rotated back if there is a table, then rounded.
template <class A>
void store_rows(A* x, Element element, const WindowSpan& span, int64_t dim,
                const RotaryTable<A>* table, A scale, MutableRows rows) {
  if constexpr (sizeof(A) == sizeof(double))
    return store_rows_of<A>(x, span, dim, table, scale, rows);
  switch (element) {
    case Element::bf16: return store_rows_of<Bf16>(x, span, dim, table, scale, rows);
    case Element::f16: return store_rows_of<Half>(x, span, dim, table, scale, rows);
    default: return store_rows_of<A>(x, span, dim, table, scale, rows);
  }
}

// Rotated q (scaled) and k of one side, and k's transpose in panels.
template <class A>
struct Scores {
  const A *q, *k, *panels;
  int64_t dim, ld;

  Scores(const ScoreSide<A>& side, const WindowSpan& span, char*& scratch) {
    const int64_t n = span_tokens(span);
    dim = side.dim;
    ld = row_stride<A>(dim);
    q = load_rows(side.q, side.element, span, dim, &side.table, side.scale, scratch);
    k = load_rows(side.k, side.element, span, dim, &side.table, A(1), scratch);
    A* to = take<A>(scratch, panels_size<A>(n, dim));
    pack_transposed(k, n, dim, ld, to);
    panels = to;
  }

  // Scores of queries [i, i + rows) and keys [j, j + keys), j a multiple of kPanelColumns.
  void tile(int64_t i, int64_t rows, int64_t j, int64_t keys, A* out, int64_t ldo) const {
    gemm<A, false>(rows, keys, dim, {q + i * ld, ld, 1},
                   {panels + j * dim, kPanelColumns<A>, kPanelColumns<A> * dim}, out, ldo);
  }
};

template <class A, MapLoss kind, bool temper>
double forward_kind(const DistillHead<A>& head, MutableRows result, char* scratch) {
  const RowTask<A> task = row_task(head);
  const int64_t n = task.n, d = head.student.dim, ld = row_stride<A>(d), lds = row_stride<A>(n);
  const Element element = head.student.element;
  const Scores<A> student(head.student, head.span, scratch),
      teacher(head.teacher, head.span, scratch);
  const A* v = load_rows<A>(head.v, element, head.span, d, nullptr, A(1), scratch);
  A* out = take<A>(scratch, matrix_size<A>(n, d));
  A* s = take<A>(scratch, matrix_size<A>(kQueries, n));
  A* t = take<A>(scratch, matrix_size<A>(kQueries, n));
  const int64_t block = n > kManyKeys ? kFewQueries : kQueries;
  double total = 0;
  for (int64_t i = 0; i < n; i += block) {
    const int64_t rows = n - i < block ? n - i : block;
    student.tile(i, rows, 0, n, s, lds);
    teacher.tile(i, rows, 0, n, t, lds);
    A divisor[kQueries], pad[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      A* stats = head.stats + span_token(head.span, i + r);
      total +=
          double(forward_row<A, kind, temper>(task, s + r * lds, t + r * lds, stats, divisor + r));
      pad[r] = task.pad_weight(stats);
    }
    gemm<A, false>(rows, d, n, {s, lds, 1}, {v, ld, kPanelColumns<A>}, out + i * ld, ld);
    for (int64_t r = 0; r < rows; ++r) {
      A* row = out + (i + r) * ld;
      const A scale = 1 / divisor[r];
      for (int64_t c = 0; c < d; ++c) row[c] *= scale;
      if (task.pads > 0)
        for (int64_t c = 0; c < d; ++c) row[c] += pad[r] * head.pad[c];
    }
  }
  store_rows<A>(out, element, head.span, d, nullptr, A(1), result);
  return total;
}

template <class A>
A dot(const A* a, const A* b, int64_t n) {
  Vec<A> total{};
  for (int64_t i = 0; i < n; i += kWidth<A>) total += load_vector(a + i) * load_vector(b + i);
  return sum<A>(total);
}

template <class A, MapLoss kind, bool temper>
void backward_kind(const DistillHead<A>& head, const DistillGrad<A>& grad, char* scratch) {
  const RowTask<A> task = row_task(head);
  const int64_t n = task.n, d = head.student.dim, ld = row_stride<A>(d);
  const int64_t lds = row_stride<A>(n < kKeys ? n : kKeys), size = matrix_size<A>(n, d);
  const Element element = head.student.element;
  const Scores<A> student(head.student, head.span, scratch),
      teacher(head.teacher, head.span, scratch);
  const A* v = load_rows<A>(head.v, element, head.span, d, nullptr, A(1), scratch);
  const A* g = load_rows<A>(grad.grad, element, head.span, d, nullptr, A(1), scratch);
  const A* out = load_rows<A>(grad.out, element, head.span, d, nullptr, A(1), scratch);
  A* v_panels = take<A>(scratch, panels_size<A>(n, d));
  pack_transposed(v, n, d, ld, v_panels);
  A* dq = take<A>(scratch, 3 * size);
  A *dk = dq + size, *dv = dk + size;
  std::memset(dq, 0, 3 * size * sizeof(A));
  A *s = take<A>(scratch, kQueries * lds), *t = take<A>(scratch, kQueries * lds);
  A* ds = take<A>(scratch, kQueries * lds + kRows);
  for (int64_t j = 0; j < n; j += kKeys) {
    const int64_t keys = n - j < kKeys ? n - j : kKeys;
    for (int64_t i = 0; i < n; i += kQueries) {
      const int64_t rows = n - i < kQueries ? n - i : kQueries;
      student.tile(i, rows, j, keys, s, lds);
      teacher.tile(i, rows, j, keys, t, lds);
      // Where P is nearly a single 1, dS is the small difference of dP and delta: short chains.
      gemm<A, false, 8>(rows, keys, d, {g + i * ld, ld, 1},
                        {v_panels + j * d, kPanelColumns<A>, kPanelColumns<A> * d}, ds, lds);
      for (int64_t r = 0; r < rows; ++r) {
        const A delta = dot(g + (i + r) * ld, out + (i + r) * ld, ld);
        backward_row<A, kind, temper>(task, keys, head.stats + span_token(head.span, i + r), delta,
                                      grad.weight, s + r * lds, t + r * lds, ds + r * lds);
      }
      gemm<A, true>(keys, d, rows, {s, 1, lds}, {g + i * ld, ld, kPanelColumns<A>}, dv + j * ld,
                    ld);
      gemm<A, true>(keys, d, rows, {ds, 1, lds}, {student.q + i * ld, ld, kPanelColumns<A>},
                    dk + j * ld, ld);
      gemm<A, true>(rows, d, keys, {ds, lds, 1}, {student.k + j * ld, ld, kPanelColumns<A>},
                    dq + i * ld, ld);
    }
  }
  const RotaryTable<A>* table = &head.student.table;
  store_rows<A>(dq, element, head.span, d, table, head.student.scale, grad.dq);
  store_rows<A>(dk, element, head.span, d, table, A(1), grad.dk);  // q has the scale already
  store_rows<A>(dv, element, head.span, d, nullptr, A(1), grad.dv);
  if (task.pads == 0) return;
  for (int64_t i = 0; i < n; ++i) {
    const A weight = task.pad_weight(head.stats + span_token(head.span, i));
    for (int64_t c = 0; c < d; ++c) grad.dpad[c] += weight * g[i * ld + c];
  }
}

template <class A>
double forward(const DistillHead<A>& head, MutableRows out, char* scratch) {
  return with_kind(head.kind, head.inv_temperature, [&]<MapLoss kind, bool temper>() {
    return forward_kind<A, kind, temper>(head, out, scratch);
  });
}

template <class A>
void backward(const DistillHead<A>& head, const DistillGrad<A>& grad, char* scratch) {
  with_kind(head.kind, head.inv_temperature, [&]<MapLoss kind, bool temper>() {
    backward_kind<A, kind, temper>(head, grad, scratch);
  });
}

template <class A>
constexpr DistillKernel<A> distill_kernel() {
  return {&scratch_bytes<A>, &forward<A>, &backward<A>};
}

}  // namespace
}  // namespace kdfast::cpu
