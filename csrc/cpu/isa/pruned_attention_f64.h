// SPDX-License-Identifier: Apache-2.0
// pruned_attention of fp64 on any CPU: plain loops, one query row at a time.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/isa/pruned_attention.h"

namespace kdfast::cpu {
namespace {

void load_row(const Rows& rows, const AttentionHead<double>& head, int64_t i, bool rotate,
              double* out) {
  const double* in = static_cast<const double*>(rows.data) + span_token(head.span, i) * rows.step;
  for (int64_t d = 0; d < head.dim; ++d) out[d] = in[d];
  if (!rotate || head.table.cos == nullptr) return;
  rotate_row(head.table, span_table_row(head.span, i), head.dim, false, out);
}

// Transposed, (D, tokens), so that the inner loops run over neighbouring keys.
void load_columns(const Rows& rows, const AttentionHead<double>& head, bool rotate, double* row,
                  double* out) {
  const int64_t n = span_tokens(head.span);
  for (int64_t j = 0; j < n; ++j) {
    load_row(rows, head, j, rotate, row);
    for (int64_t d = 0; d < head.dim; ++d) out[d * n + j] = row[d];
  }
}

// scores[j] = sum_d x[d] columns[d, j], four d at a time: fewer passes, and shorter chains of sums.
void products(const double* x, const double* columns, int64_t dim, int64_t n, double* scores) {
  for (int64_t j = 0; j < n; ++j) scores[j] = 0;
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4) {
    const double* c = columns + d * n;
    for (int64_t j = 0; j < n; ++j)
      scores[j] +=
          (x[d] * c[j] + x[d + 1] * c[n + j]) + (x[d + 2] * c[2 * n + j] + x[d + 3] * c[3 * n + j]);
  }
  for (; d < dim; ++d)
    for (int64_t j = 0; j < n; ++j) scores[j] += x[d] * columns[d * n + j];
}

// Products to scores of query i; returns what its lse is counted from.
double finish_scores(const AttentionHead<double>& head, int64_t i, int64_t n, double* scores) {
  for (int64_t j = 0; j < n; ++j) scores[j] *= head.scale;
  if (head.bias.data == nullptr) return 0;
  const double* bias = head.bias.data + i * head.bias.step;
  double largest = bias[0];
  for (int64_t j = 0; j < n; ++j) {
    largest = std::fmax(largest, bias[j]);
    scores[j] += bias[j];
  }
  return row_base(largest);
}

// out[d] += sum_j weights[j] rows[j, d], and their sum to the return value, by blocks: one long
// chain of additions would lose more than a matrix product does.
double add_rows(const double* weights, const double* rows, int64_t dim, int64_t n, double* part,
                double* out) {
  constexpr int64_t kBlock = 64;
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t stop = start + kBlock < n ? start + kBlock : n;
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) part[d] = 0;
    for (int64_t j = start; j < stop; ++j) {
      sum += weights[j];
      for (int64_t d = 0; d < dim; ++d) part[d] += weights[j] * rows[j * dim + d];
    }
    total += sum;
    for (int64_t d = 0; d < dim; ++d) out[d] += part[d];
  }
  return total;
}

int64_t forward_bytes(int64_t n, int64_t dim) {
  return (2 * n * dim + n + 2 * dim) * static_cast<int64_t>(sizeof(double)) + 5 * 64;
}

void forward(const AttentionHead<double>& head, int64_t begin, int64_t end, MutableRows out,
             double* lse, char* scratch) {
  const int64_t n = span_tokens(head.span), dim = head.dim;
  double* keys = take<double>(scratch, n * dim);
  double* values = take<double>(scratch, n * dim);
  double* p = take<double>(scratch, n);
  double* row = take<double>(scratch, dim);
  double* sum = take<double>(scratch, dim);
  load_columns(head.k, head, true, row, keys);
  for (int64_t j = 0; j < n; ++j) load_row(head.v, head, j, false, values + j * dim);
  for (int64_t i = begin; i < end; ++i) {
    load_row(head.q, head, i, true, row);
    products(row, keys, dim, n, p);
    const double base = finish_scores(head, i, n, p);
    double top = head.span.pads ? 0.0 : p[0];
    for (int64_t j = 0; j < n; ++j) top = std::fmax(top, p[j]);
    if (top == -std::numeric_limits<double>::infinity()) top = 0;
    const double pads = head.span.pads ? head.span.pads * std::exp(-top) : 0.0;
    for (int64_t j = 0; j < n; ++j) p[j] = std::exp(p[j] - top);
    for (int64_t d = 0; d < dim; ++d) sum[d] = head.span.pads ? pads * head.pad[d] : 0.0;
    const double total = pads + add_rows(p, values, dim, n, row, sum);
    const bool dead = total == 0;  // no score is finite
    const int64_t token = span_token(head.span, i);
    double* to = static_cast<double*>(out.data) + token * out.step;
    for (int64_t d = 0; d < dim; ++d) to[d] = dead ? 0 : sum[d] / total;
    lse[token] = dead ? std::numeric_limits<double>::infinity() : top - base + std::log(total);
  }
}

int64_t backward_bytes(int64_t n, int64_t dim) {
  const int64_t chunk_sums = 2 * sum_rows(n) * sum_columns(dim);
  return (3 * n * dim + chunk_sums + 2 * n + 4 * dim) * static_cast<int64_t>(sizeof(double)) +
         10 * 64;
}

void store_row(const AttentionHead<double>& head, int64_t i, bool rotated, double* x,
               MutableRows out) {
  if (rotated) {
    for (int64_t d = 0; d < head.dim; ++d) x[d] *= head.scale;
    rotate_row(head.table, span_table_row(head.span, i), head.dim, true, x);
  }
  double* to = static_cast<double*>(out.data) + span_token(head.span, i) * out.step;
  for (int64_t d = 0; d < head.dim; ++d) to[d] = x[d];
}

struct Backward {
  const AttentionHead<double>& head;
  const AttentionGrad<double>& grad;
  double *keys, *key_columns, *value_columns, *p, *ds, *q, *g, *part, *dq;

  void query(int64_t i, double* dk, double* dv) {
    const int64_t n = span_tokens(head.span), dim = head.dim, columns = sum_columns(dim);
    const double lse = grad.lse[span_token(head.span, i)];
    load_row(head.q, head, i, true, q);
    load_row(grad.grad, head, i, false, g);
    products(q, key_columns, dim, n, p);
    products(g, value_columns, dim, n, ds);
    const double base = finish_scores(head, i, n, p);
    // The row is at hand, so P is normalised again, which undoes the rounding of lse, and delta is
    // the sum of P dP: equal to <g, out>, but its error cancels in dP - delta.
    double pads = head.span.pads ? head.span.pads * std::exp(-lse) : 0.0, total = pads, delta = 0;
    for (int64_t j = 0; j < n; ++j) total += p[j] = std::exp(p[j] - base - lse);
    if (total == 0) total = 1;  // no score is finite: all of P is zero
    pads /= total;
    for (int64_t d = 0; head.span.pads && d < dim; ++d) delta += pads * g[d] * head.pad[d];
    for (int64_t j = 0; j < n; ++j) delta += (p[j] /= total) * ds[j];
    for (int64_t j = 0; j < n; ++j) ds[j] = p[j] * (ds[j] - delta);
    for (int64_t j = 0; grad.dbias != nullptr && j < n; ++j)
      grad.dbias[j * bias_columns(n) + i] += ds[j];
    for (int64_t d = 0; d < dim; ++d) dq[d] = 0;
    add_rows(ds, keys, dim, n, part, dq);
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t d = 0; d < dim; ++d) dk[j * columns + d] += ds[j] * q[d];
      for (int64_t d = 0; d < dim; ++d) dv[j * columns + d] += p[j] * g[d];
    }
    for (int64_t d = 0; head.span.pads && d < dim; ++d) grad.dpad[d] += pads * g[d];
    store_row(head, i, true, dq, grad.dq);
  }
};

void backward(const AttentionHead<double>& head, const AttentionGrad<double>& grad, int64_t begin,
              int64_t end, bool first, double* sums, char* scratch) {
  const int64_t n = span_tokens(head.span), dim = head.dim;
  const int64_t part_size = sum_rows(n) * sum_columns(dim), chunk = query_chunk(n);
  double* keys = take<double>(scratch, n * dim);
  double* key_columns = take<double>(scratch, n * dim);
  double* value_columns = take<double>(scratch, n * dim);
  double* part = take<double>(scratch, 2 * part_size);
  double* p = take<double>(scratch, n);
  double* ds = take<double>(scratch, n);
  double* rows[4];
  for (double*& row : rows) row = take<double>(scratch, dim);
  load_columns(head.k, head, true, rows[0], key_columns);
  load_columns(head.v, head, false, rows[0], value_columns);
  for (int64_t j = 0; j < n; ++j) load_row(head.k, head, j, true, keys + j * dim);
  Backward work{head, grad,    keys,    key_columns, value_columns, p,
                ds,   rows[0], rows[1], rows[2],     rows[3]};
  for (int64_t start = begin; start < end; start += chunk) {
    std::memset(part, 0, 2 * part_size * sizeof(double));
    for (int64_t i = start; i < end && i < start + chunk; ++i)
      work.query(i, part, part + part_size);
    for (int64_t x = 0; x < 2 * part_size; ++x) sums[x] = first ? part[x] : sums[x] + part[x];
    first = false;
  }
}

void backward_keys(const AttentionHead<double>& head, const AttentionGrad<double>& grad,
                   double* sums, int64_t count) {
  const int64_t n = span_tokens(head.span), columns = sum_columns(head.dim);
  const int64_t size = 2 * sum_rows(n) * columns;
  for (int64_t c = 1; c < count; ++c)
    for (int64_t x = 0; x < size; ++x) sums[x] += sums[c * size + x];
  for (int64_t j = 0; j < n; ++j) {
    store_row(head, j, true, sums + j * columns, grad.dk);
    store_row(head, j, false, sums + (sum_rows(n) + j) * columns, grad.dv);
  }
}

}  // namespace
}  // namespace kdfast::cpu
