// SPDX-License-Identifier: Apache-2.0
// Backward of attention_distill, riding on that of pruned_attention: the teacher's scores besides
// the student's, and the gradient of the distance in dS. Names as in docs/ops/attention_distill.md.
#pragma once
#include <initializer_list>

#include "cpu/isa/attention_distill_forward.h"
#include "cpu/isa/pruned_attention_backward.h"

namespace kdfast::cpu {
namespace {

// What a chunk's queries share over all keys: vectors over the queries, and what is one for all.
struct QueryLanes {
  // The anchors' centers and offsets; 1 / sum of exponentials of the attention and of both maps.
  float *center, *top, *share, *map_share, *teacher_center, *teacher_top, *teacher_share;
  float *gap, *first, *second;  // log of the sums of P over that of R; x; y
  const float* delta;
  float scale, teacher_scale, inv, weight;
};
constexpr int64_t kQueryArrays = 10;

// Scores (keys, queries) of M::kRows keys, of which `keys` there are, and one or two vectors of
// queries from `lane` on; P and dS of them go to `p`, `ds` and `pairs`.
struct ColumnTile {
  const float *s, *t, *g;
  int64_t lane, keys;
  bool two;
  int32_t *p, *ds, *pairs;
  int64_t stride, pair_stride;
};

template <class M, MapLoss kind, bool temper>
struct ColumnKernel {
  static constexpr bool kLogits = kind == MapLoss::logit_mse;
  Vec16 scale, top, share, map_share, teacher_scale, teacher_top, teacher_share;
  Vec16 gap, first, second, delta, weight, inv, step;

  ColumnKernel(const QueryLanes& q, int64_t lane, Mask16 m)
      : scale(splat16(q.scale)),
        top(load16(q.top + lane, m)),
        share(load16(q.share + lane, m)),
        map_share(load16(q.map_share + lane, m)),
        teacher_scale(splat16(q.teacher_scale)),
        teacher_top(load16(q.teacher_top + lane, m)),
        teacher_share(load16(q.teacher_share + lane, m)),
        gap(load16(q.gap + lane, m)),
        first(load16(q.first + lane, m)),
        second(load16(q.second + lane, m)),
        delta(load16(q.delta + lane, m)),
        weight(splat16(q.weight)),
        inv(splat16(q.inv)),
        step(splat16(temper ? kLn2 * q.inv : kLn2)) {}

  // U and dS of one key; both are zero and no more than that where it is not `real`.
  __attribute__((always_inline)) inline Vec16 gradient(const float* s, const float* t,
                                                       const float* g, Mask16 real,
                                                       Vec16* u) const {
    const Vec16 x = fms16(load16(s), scale, top);
    const Vec16 y = fms16(load16(t), teacher_scale, teacher_top);
    *u = keep16(real, exp2_16<M::kDegree>(x) * share);
    Vec16 da, p = *u, r = zero16(), d = r;
    if constexpr (kLogits) {
      da = (x - y) * splat16(kLn2);
    } else {
      if constexpr (temper) p = exp2_16<M::kDegree>(x * inv) * map_share;
      if constexpr (kByMap<kind>) r = exp2_16<M::kDegree>(temper ? y * inv : y) * teacher_share;
      if constexpr (kByLog<kind>) d = fms16(x - y, step, gap);
      da = map_gradient<TileMath, kind>(p, r, d, first, second);
    }
    return keep16(real, fma16(weight, da, *u * (load16(g) - delta)));
  }

  static void run(const QueryLanes& q, ColumnTile c) {
    const Mask16 others = all_or_none(c.two);
    const ColumnKernel one(q, c.lane, tail_mask(kVector)), two(q, c.lane + kVector, others);
    Vec16 above[2];
#pragma GCC unroll 8
    for (int i = 0; i < M::kRows; ++i) {
      const Mask16 real = all_or_none(i < c.keys);
      Vec16 u0, u1;
      const Vec16 d0 = one.gradient(c.s, c.t, c.g, real, &u0);
      const Vec16 d1 =
          two.gradient(c.s + kVector, c.t + kVector, c.g + kVector, both(real, others), &u1);
      M::store2(c.p, u0, u1);
      M::store2(c.ds, d0, d1);
      if constexpr (M::kNeighbours) {
        if (i % 2) {
          M::store_pairs(c.pairs, above[0], d0, c.pair_stride);
          M::store_pairs(c.pairs + kVector, above[1], d1, c.pair_stride);
          c.pairs += c.pair_stride;
        }
        above[0] = d0;
        above[1] = d1;
      }
      c.s += kPanel;
      c.t += kPanel;
      c.g += kPanel;
      c.p += c.stride;
      c.ds += c.stride;
    }
  }
};

// dP, by products of its own if M has them.
template <class M>
void value_scores(const int32_t* rows, int64_t width, int64_t count, const int32_t* lanes,
                  int64_t columns, int64_t steps, float* out, int64_t out_step) {
  if constexpr (requires { M::kChain; })
    M::short_scores(rows, width, lanes, columns, steps, out, out_step);
  else
    M::scores(rows, width, count, lanes, columns, steps, out, out_step);
}

template <class T, class M>
struct DistillBackward : Backward<T, M> {
  using Base = Backward<T, M>;
  using Base::chunk, Base::dp, Base::ds, Base::ds_pairs, Base::n, Base::p, Base::scores,
      Base::stride;

  const DistillHead<float>& task;
  const ScoreSide<float>& teacher = task.teacher;
  const Sizes<M> other{teacher.dim};
  QueryLanes queries;
  void (*columns)(const QueryLanes&, ColumnTile);
  int32_t *teacher_k, *teacher_lanes, *teacher_block;
  float *teacher_buffer, *teacher_scores;
  bool anchored = false;  // whether a query of the chunk has a center

  static int64_t bytes(int64_t n, int64_t dim, int64_t teacher_dim) {
    const Sizes<M> s(teacher_dim);
    const int64_t m = query_chunk(n), rows = round_up(n, M::kKeys);
    const int64_t dwords = (rows + kVector) * s.width + s.lanes(m) + s.width * M::kPair +
                           M::kRows * kPanel + kQueryArrays * m;
    return round_up(Base::bytes(n, dim), 64) + dwords * 4 + (5 + kQueryArrays) * 64;
  }

  DistillBackward(const AttentionHead<float>& h, const AttentionGrad<float>& g,
                  const DistillHead<float>& d, float weight, char* scratch)
      : Base(h, g, scratch), task(d) {
    scratch += round_up(Base::bytes(n, h.dim), 64);
    const int64_t rows = round_up(n, M::kKeys);
    teacher_k = take<int32_t>(scratch, rows * other.width);
    teacher_block = take<int32_t>(scratch, kVector * other.width);
    teacher_lanes = take<int32_t>(scratch, other.lanes(chunk));
    teacher_buffer = take<float>(scratch, other.width * M::kPair);
    teacher_scores = take<float>(scratch, M::kRows * kPanel);
    for (float** x : {&queries.center, &queries.top, &queries.share, &queries.map_share,
                      &queries.teacher_center, &queries.teacher_top, &queries.teacher_share,
                      &queries.gap, &queries.first, &queries.second})
      *x = take<float>(scratch, chunk);
    queries.delta = this->delta;
    queries.scale = fabsf(d.student.scale) * kLog2e;
    queries.teacher_scale = fabsf(teacher.scale) * kLog2e;
    queries.inv = d.inv_temperature;
    columns = with_kind(d.kind, d.inv_temperature, [&]<MapLoss kind, bool temper>() {
      queries.weight = gradient_weight<float, kind>(weight, d.inv_temperature, n);
      return &ColumnKernel<M, kind, temper>::run;
    });
    Walk key(task.span, 0);
    pack_side<M>(teacher, false, key, n, rows, teacher_buffer, teacher_k);
  }

  void pack_queries(int64_t begin, int64_t count) {
    Base::pack_queries(begin, count);
    const int64_t lanes = round_up(count, kVector);
    Walk query(task.span, begin), walk = query;
    for (int64_t first = 0; first < lanes; first += kVector) {
      const int64_t some = count - first < kVector ? count - first : kVector;
      pack_side<M>(teacher, true, query, some, kVector, teacher_buffer, teacher_block);
      to_lanes(teacher_block, other.width, first, lanes, other.steps, teacher_lanes);
    }
    anchored = false;
    for (int64_t i = 0; i < count; ++i, walk.next()) read_row(i, task.stats + walk.token());
    // A lane without a query has scores of 0 and gets P = R = 0.
    for (int64_t i = count; i < lanes; ++i) {
      queries.share[i] = queries.map_share[i] = queries.teacher_share[i] = 1e30f;
      queries.center[i] = queries.teacher_center[i] = queries.gap[i] = 0;
      queries.top[i] = queries.teacher_top[i] = 0;
      queries.first[i] = queries.second[i] = 0;
    }
    for (float* x : {queries.share, queries.map_share, queries.teacher_share})
      for (int64_t i = 0; i < lanes; i += kVector)
        store16(x + i, exact_exponential(zero16() - load16(x + i)));
  }

  void read_row(int64_t i, const float* stats) {
    const int64_t step = task.stats_step, count = kMapStats[static_cast<int>(task.kind)];
    const auto read = [&](int64_t which) { return which < count ? stats[which * step] : 0.0f; };
    const float scale = fabsf(task.student.scale), teacher_scale = fabsf(teacher.scale);
    const Anchor own = anchor_of(stats[kTop * step], scale, queries.inv);
    const Anchor its = count <= kTeacherTop
                           ? same_anchor(own, stats[kTop * step], scale, teacher_scale)
                           : anchor_of(read(kTeacherTop), teacher_scale, queries.inv);
    anchored = anchored || own.center != 0 || its.center != 0;
    queries.center[i] = own.center;
    queries.top[i] = own.offset;
    queries.share[i] = stats[kLogSum * step];
    queries.map_share[i] = read(kMapLogSum);
    queries.teacher_center[i] = its.center;
    queries.teacher_top[i] = its.offset;
    queries.teacher_share[i] = read(kTeacherLogSum);
    queries.gap[i] = read(kMapLogSum) - read(kTeacherLogSum);
    queries.first[i] = read(kFirstSum);
    queries.second[i] = read(kSecondSum);
  }

  // Takes the centers of `lanes` queries from their scores of `keys` keys. Products that are summed
  // in another order than the forward's must not exceed its maximum.
  static void subtract_lanes(float* x, int64_t keys, int64_t lanes, const float* center,
                             bool bounded) {
    for (int64_t j = 0; j < keys; ++j, x += kPanel)
      for (int64_t i = 0; i < lanes; ++i) {
        const float above = x[i] - center[i];
        x[i] = bounded && center[i] != 0 && above > 0 ? 0 : above;
      }
  }

  void probabilities(int64_t key, int64_t at, int64_t above, int64_t lane, int64_t wide) {
    M::scores(teacher_k + key * other.width, other.width, n - key,
              teacher_lanes + lane * other.steps, wide * kVector, other.steps, teacher_scores,
              kPanel);
    M::scores(this->k_rows + key * this->size.width, this->size.width, n - key,
              this->q_lanes + lane * this->size.steps, wide * kVector, this->size.steps, scores,
              kPanel);
    value_scores<M>(this->v_rows + key * this->size.width, this->size.width, n - key,
                    this->g_lanes + lane * this->size.steps, wide * kVector, this->size.steps, dp,
                    kPanel);
    if (anchored) {
      const int64_t keys = n - key < M::kRows ? n - key : M::kRows, lanes = wide * kVector;
      const bool maps = task.kind != MapLoss::logit_mse;
      subtract_lanes(scores, keys, lanes, queries.center + lane, true);
      subtract_lanes(teacher_scores, keys, lanes, queries.teacher_center + lane, maps);
    }
    for (int64_t v = 0; v < wide; v += 2) {
      const int64_t from = v * kVector, to = at * stride + (lane + from) / M::kPair;
      int32_t* pairs = nullptr;
      if (M::kNeighbours) pairs = ds_pairs + above / M::kPair * this->pair_stride + lane + from;
      columns(queries, {scores + from, teacher_scores + from, dp + from, lane + from, n - key,
                        v + 1 < wide, p + to, ds + to, pairs, stride, this->pair_stride});
    }
  }
};

template <class T, class M>
struct DistillTiles {
  static int64_t scratch_bytes(int64_t n, int64_t dim, int64_t teacher_dim) {
    const int64_t forward = DistillForward<T, M>::bytes(n, dim, teacher_dim);
    const int64_t backward = sums_bytes(n, dim) + DistillBackward<T, M>::bytes(n, dim, teacher_dim);
    return forward > backward ? forward : backward;
  }
  static int64_t sums_bytes(int64_t n, int64_t dim) {
    return round_up(2 * sum_rows(n) * sum_columns(dim) * static_cast<int64_t>(sizeof(float)), 64);
  }

  static double forward(const DistillHead<float>& head, MutableRows out, char* scratch) {
    return DistillForward<T, M>(student_of(head), head, scratch).run(out);
  }

  static void backward(const DistillHead<float>& head, const DistillGrad<float>& grad,
                       char* scratch) {
    AttentionHead<float> student = student_of(head);
    // The padded keys' value gets its gradient below, from the statistics of this op.
    student.span.pads = 0;
    const AttentionGrad<float> own{grad.grad, grad.out, head.stats + kTop * head.stats_step,
                                   grad.dq,   grad.dk,  grad.dv,
                                   grad.dpad, nullptr};
    const int64_t n = span_tokens(head.span);
    float* sums = reinterpret_cast<float*>(scratch);
    DistillBackward<T, M> distill(student, own, head, grad.weight,
                                  scratch + sums_bytes(n, head.student.dim));
    distill.run_as(distill, 0, n, true, sums);
    backward_keys<T>(student, own, sums, 1);
    if (head.span.pads == 0) return;
    Walk walk(head.span, 0);
    for (int64_t i = 0; i < n; ++i, walk.next()) {
      const float* stats = head.stats + walk.token();
      const float log_sum = stats[kTop * head.stats_step] * fabsf(head.student.scale) +
                            stats[kLogSum * head.stats_step];
      distill.add_pad(static_cast<const T*>(grad.grad.data) + walk.token() * grad.grad.step,
                      static_cast<float>(head.span.pads) * expf(-log_sum));
    }
  }
};

// Student of element type T; the teacher of any but f64, or bf16 where M has products in bf16.
template <class T, class M>
constexpr DistillKernel<float> distill_tiles() {
  using D = DistillTiles<T, M>;
  return {&D::scratch_bytes, &D::forward, &D::backward};
}

}  // namespace
}  // namespace kdfast::cpu
