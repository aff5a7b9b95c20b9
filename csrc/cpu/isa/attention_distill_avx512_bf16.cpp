// SPDX-License-Identifier: Apache-2.0
// attention_distill of bf16 with products in bf16 and sums in fp32: AVX-512 with AVX512_BF16.
//
// Rows of scores are those of attention_distill_rows.h, in fp32; the weights U and dS are rounded
// to bf16 before they meet v, and g, q and k. Packed forms of tensors: attention_packing.h.
#include "cpu/isa/attention_distill_rows.h"
#include "cpu/isa/bf16_math.h"
#include "cpu/isa/pruned_attention_backward.h"
#include "cpu/isa/register_tiles.h"

namespace kdfast::cpu {
namespace {

using M = Bf16Math;
// Queries and keys of a tile, multiples of kTile and of kPanel: three tiles of scores fit into L2.
// The forward holds whole rows of scores, of fewer queries where they are long.
constexpr int64_t kQueries = 48, kFewQueries = 24, kManyKeys = 768, kKeys = 384;

// Sizes in dwords of the packed forms of n rows, which end in zeros.
struct Packing {
  int64_t n, dim;
  int64_t steps = divide_up(dim, M::kPair);
  int64_t width = divide_up(dim, kVector* M::kPair) * kVector;
  int64_t columns = round_up(dim, kVector);
  int64_t padded = round_up(n, kQueries);

  int64_t rows() const { return padded * width; }
  int64_t lanes() const { return round_up(n, kVector) * steps; }
  int64_t pairs() const { return padded / M::kPair * columns; }
  int64_t sums() const { return padded * columns; }
};

// Between rows of scores: whole vectors, and two of them where those are pairs.
int64_t score_stride(int64_t keys) { return round_up(keys, kVector) + kVector; }

// Scores are scaled with the queries where that is exact, or else afterwards.
float early_scale(float scale) {
  int exponent;
  return fabsf(frexpf(scale, &exponent)) == 0.5f ? scale : 1.0f;
}

// Everything of one head; laid out alike for any thread, and without memory to learn its size.
struct Workspace {
  char* base;
  int64_t used = 0;
  Packing own, other;
  int32_t *block, *q, *g, *teacher_q, *k_lanes, *v_lanes, *teacher_lanes, *q_pairs, *g_pairs,
      *right_pairs, *u_pairs, *ds_pairs, *weights;
  float *buffer, *delta, *s, *t, *ds, *sums;

  Workspace(int64_t n, int64_t dim, int64_t teacher_dim, char* scratch)
      : base(scratch), own{n, dim}, other{n, teacher_dim} {
    const int64_t widest = own.width > other.width ? own.width : other.width;
    const int64_t stride = score_stride(n > kKeys ? n : kKeys), tile = score_stride(kKeys);
    take(block, own.padded * widest);
    take(q, own.rows());
    take(g, own.rows());
    take(teacher_q, other.rows());
    take(k_lanes, own.lanes());
    take(v_lanes, own.lanes());
    take(teacher_lanes, other.lanes());
    take(q_pairs, own.pairs());
    take(g_pairs, own.pairs());
    take(right_pairs, own.pairs());
    take(u_pairs, kQueries / M::kPair * tile);
    take(ds_pairs, kQueries / M::kPair * tile);
    take(weights, kQueries * stride / M::kPair);
    take(buffer, widest * M::kPair);
    take(delta, own.padded);
    take(s, kQueries * stride);
    take(t, kQueries * stride);
    take(ds, kQueries * tile);
    take(sums, 3 * own.sums());
  }

  template <class T>
  void take(T*& to, int64_t count) {
    to = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }

  void pack(Rows x, const WindowSpan& span, const Packing& size, const RotaryTable<float>* table,
            float sign, int32_t* rows) const {
    Walk walk(span, 0);
    pack_rows<Bf16, M>(static_cast<const Bf16*>(x.data), x.step, walk, size.n, size.padded,
                       {size.dim, table, sign}, buffer, rows);
  }
  // The lanes form of the rows in `block`.
  void lanes(const Packing& size, int32_t* out) const {
    const int64_t total = round_up(size.n, kVector);
    for (int64_t first = 0; first < total; first += kVector)
      to_lanes(block + first * size.width, size.width, first, total, size.steps, out);
  }
  void pairs(const int32_t* rows, int32_t* out) const {
    M::to_pairs(rows, own.width, own.padded, own.columns, out);
  }

  // q's rows and k's lanes of one side; the rows of k stay in `block`.
  void pack_side(const ScoreSide<float>& side, const WindowSpan& span, const Packing& size,
                 int32_t* rows, int32_t* k) const {
    pack(side.q, span, size, &side.table, early_scale(side.scale), rows);
    pack(side.k, span, size, &side.table, 1.0f, block);
    lanes(size, k);
  }
  void pack_scores(const DistillHead<float>& head) const {
    pack_side(head.teacher, head.span, other, teacher_q, teacher_lanes);
    pack_side(head.student, head.span, own, q, k_lanes);
  }
};

// Products of rows [i, i + rows) and lanes [j, j + keys), times factor; j a multiple of kPanel.
void tile_of(const Packing& size, const int32_t* rows_form, const int32_t* lanes_form, float factor,
             int64_t i, int64_t rows, int64_t j, int64_t keys, float* out, int64_t stride) {
  const int64_t total = round_up(size.n, kVector);
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t r = 0; r < rows; r += kTile) {
    for (int64_t c = 0; c < keys; c += kPanel) {
      const int64_t left = total - j - c, lanes = left < kPanel ? left : kPanel;
      float* to = out + r * stride + c;
      tile<M>(lanes / kVector, rows_form + (i + r) * size.width, size.width, 1,
              lanes_form + (j + c) * size.steps, lanes, size.steps, to, stride, false);
      if (factor == 1.0f) continue;
      for (int64_t a = 0; a < kTile; ++a)
        for (int64_t v = 0; v < lanes; v += kVector)
          _mm512_storeu_ps(to + a * stride + v,
                           _mm512_mul_ps(_mm512_loadu_ps(to + a * stride + v), scale));
    }
  }
}

void student_tile(const DistillHead<float>& head, const Workspace& w, int64_t i, int64_t rows,
                  int64_t j, int64_t keys, int64_t stride) {
  const float scale = head.student.scale, teacher = head.teacher.scale;
  tile_of(w.own, w.q, w.k_lanes, scale / early_scale(scale), i, rows, j, keys, w.s, stride);
  tile_of(w.other, w.teacher_q, w.teacher_lanes, teacher / early_scale(teacher), i, rows, j, keys,
          w.t, stride);
}

// One row of fp32 as bf16, zero from `end` (a multiple of kVector) to a multiple of two vectors.
void to_row(const float* x, int64_t end, int32_t* out) {
  for (int64_t c = 0; c < end; c += 2 * kVector) {
    const bool two = c + kVector < end;
    const __m512 b = two ? _mm512_loadu_ps(x + c + kVector) : _mm512_setzero_ps();
    M::store2(out + c / M::kPair, _mm512_loadu_ps(x + c), b);
  }
}

// Pairs of neighbouring rows; an odd last one is paired with zeros.
void to_row_pairs(const float* x, int64_t stride, int64_t rows, int64_t end, int32_t* out) {
  for (int64_t r = 0; r < rows; r += 2, out += stride, x += 2 * stride) {
    for (int64_t c = 0; c < end; c += kVector) {
      const __m512 b = r + 1 < rows ? _mm512_loadu_ps(x + stride + c) : _mm512_setzero_ps();
      M::store_pairs(out + c, _mm512_loadu_ps(x + c), b);
    }
  }
}

template <MapLoss kind, bool temper>
double forward_kind(const DistillHead<float>& head, MutableRows result, char* scratch) {
  const RowTask<float> task = row_task(head);
  const int64_t n = task.n, dim = head.student.dim, end = round_up(n, kVector);
  const Workspace w(n, dim, head.teacher.dim, scratch);
  const int64_t stride = score_stride(n), half = stride / M::kPair, columns = w.own.columns;
  w.pack_scores(head);
  w.pack(head.v, head.span, w.own, nullptr, 1.0f, w.block);
  w.pairs(w.block, w.right_pairs);
  const int64_t block = n > kManyKeys ? kFewQueries : kQueries;
  Walk walk(head.span, 0);
  double total = 0;
  for (int64_t i = 0; i < n; i += block) {
    const int64_t rows = n - i < block ? n - i : block;
    student_tile(head, w, i, rows, 0, n, stride);
    float divisor[kQueries], pad[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      float* stats = head.stats + span_token(head.span, i + r);
      float *s = w.s + r * stride, *t = w.t + r * stride;
      total += double(forward_row<float, kind, temper>(task, s, t, stats, divisor + r));
      pad[r] = task.pad_weight(stats);
      to_row(s, end, w.weights + r * half);
    }
    for (int64_t r = 0; r < rows; ++r, walk.next()) {
      if (r % kTile == 0)
        weighted_rows<M>(w.weights + r * half, half, 1, w.right_pairs, columns,
                         divide_up(n, M::kPair), w.sums, false);
      const __m512 share = _mm512_set1_ps(1 / divisor[r]), value = _mm512_set1_ps(pad[r]);
      Bf16* out = static_cast<Bf16*>(result.data) + walk.token() * result.step;
      for (int64_t d = 0; d < dim; d += kVector) {
        const __mmask16 m = tail_mask(dim - d);
        __m512 o = _mm512_mul_ps(_mm512_loadu_ps(w.sums + r % kTile * columns + d), share);
        if (task.pads > 0) o = _mm512_fmadd_ps(value, load16(head.pad + d, m), o);
        store16(out + d, m, o);
      }
    }
  }
  return total;
}

// <g, out> of every row, and the gradient of the pad value.
void add_rows(const DistillHead<float>& head, const DistillGrad<float>& grad,
              const RowTask<float>& task, float* delta) {
  const int64_t dim = head.student.dim;
  Walk walk(head.span, 0);
  for (int64_t i = 0; i < task.n; ++i, walk.next()) {
    const Bf16* g = static_cast<const Bf16*>(grad.grad.data) + walk.token() * grad.grad.step;
    const Bf16* o = static_cast<const Bf16*>(grad.out.data) + walk.token() * grad.out.step;
    const __m512 weight =
        _mm512_set1_ps(task.pads > 0 ? task.pad_weight(head.stats + walk.token()) : 0.0f);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += kVector) {
      const __mmask16 m = tail_mask(dim - d);
      const __m512 value = load16(g + d, m);
      sum = _mm512_fmadd_ps(value, load16(o + d, m), sum);
      if (task.pads > 0)
        store16(grad.dpad + d, m, _mm512_fmadd_ps(weight, value, load16(grad.dpad + d, m)));
    }
    delta[i] = _mm512_reduce_add_ps(sum);
  }
}

// Adds what the tile's rows of U (in s) and of dS contribute to dq, dk and dv.
void add_products(const Workspace& w, int64_t i, int64_t rows, int64_t j, int64_t keys,
                  int64_t stride) {
  const int64_t end = round_up(keys, kVector), columns = w.own.columns, size = w.own.sums();
  const int64_t half = stride / M::kPair;
  float *dq = w.sums + i * columns, *dk = w.sums + size + j * columns, *dv = dk + size;
  to_row_pairs(w.s, stride, rows, end, w.u_pairs);
  to_row_pairs(w.ds, stride, rows, end, w.ds_pairs);
  for (int64_t r = 0; r < rows; ++r) to_row(w.ds + r * stride, end, w.weights + r * half);
  const int64_t above = i / M::kPair * columns, steps = divide_up(rows, M::kPair);
  for (int64_t k = 0; k < keys; k += kTile) {
    weighted_rows<M>(w.u_pairs + k, 1, stride, w.g_pairs + above, columns, steps, dv + k * columns,
                     i > 0);
    weighted_rows<M>(w.ds_pairs + k, 1, stride, w.q_pairs + above, columns, steps, dk + k * columns,
                     i > 0);
  }
  for (int64_t r = 0; r < rows; r += kTile)
    weighted_rows<M>(w.weights + r * half, half, 1, w.right_pairs + j / M::kPair * columns, columns,
                     divide_up(keys, M::kPair), dq + r * columns, j > 0);
}

template <MapLoss kind, bool temper>
void backward_kind(const DistillHead<float>& head, const DistillGrad<float>& grad, char* scratch) {
  const RowTask<float> task = row_task(head);
  const int64_t n = task.n, dim = head.student.dim;
  const Workspace w(n, dim, head.teacher.dim, scratch);
  const int64_t stride = score_stride(n < kKeys ? n : kKeys);
  w.pack_scores(head);
  w.pairs(w.block, w.right_pairs);
  w.pairs(w.q, w.q_pairs);
  w.pack(head.v, head.span, w.own, nullptr, 1.0f, w.block);
  w.lanes(w.own, w.v_lanes);
  w.pack(grad.grad, head.span, w.own, nullptr, 1.0f, w.g);
  w.pairs(w.g, w.g_pairs);
  add_rows(head, grad, task, w.delta);
  for (int64_t j = 0; j < n; j += kKeys) {
    const int64_t keys = n - j < kKeys ? n - j : kKeys;
    for (int64_t i = 0; i < n; i += kQueries) {
      const int64_t rows = n - i < kQueries ? n - i : kQueries;
      student_tile(head, w, i, rows, j, keys, stride);
      tile_of(w.own, w.g, w.v_lanes, 1.0f, i, rows, j, keys, w.ds, stride);
      for (int64_t r = 0; r < rows; ++r)
        backward_row<float, kind, temper>(task, keys, head.stats + span_token(head.span, i + r),
                                          w.delta[i + r], grad.weight, w.s + r * stride,
                                          w.t + r * stride, w.ds + r * stride);
      add_products(w, i, rows, j, keys, stride);
    }
  }
  const ScoreSide<float>& side = head.student;
  const int64_t size = w.own.sums();
  Walk walk(head.span, 0);
  for (int64_t i = 0; i < n; ++i, walk.next()) {
    const auto write = [&](int64_t which, float scale, const RotaryTable<float>* table,
                           MutableRows to) {
      store_row<Bf16>(w.sums + which * size + i * w.own.columns, scale, table, dim, walk,
                      static_cast<Bf16*>(to.data) + walk.token() * to.step);
    };
    write(0, side.scale, &side.table, grad.dq);
    write(1, side.scale / early_scale(side.scale), &side.table, grad.dk);
    write(2, 1.0f, nullptr, grad.dv);
  }
}

int64_t scratch_bytes(int64_t n, int64_t dim, int64_t teacher_dim) {
  return Workspace(n, dim, teacher_dim, nullptr).used;
}

double forward(const DistillHead<float>& head, MutableRows out, char* scratch) {
  return with_kind(head, [&]<MapLoss kind, bool temper>() {
    return forward_kind<kind, temper>(head, out, scratch);
  });
}

void backward(const DistillHead<float>& head, const DistillGrad<float>& grad, char* scratch) {
  with_kind(head,
            [&]<MapLoss kind, bool temper>() { backward_kind<kind, temper>(head, grad, scratch); });
}

}  // namespace

DistillKernel<float> distill_avx512_bf16() { return {&scratch_bytes, &forward, &backward}; }

}  // namespace kdfast::cpu
