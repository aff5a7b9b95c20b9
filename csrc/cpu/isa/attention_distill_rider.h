// SPDX-License-Identifier: Apache-2.0
// attention_distill of "kl" at temperature 1, where both sides have one element type, as a rider on
// the kernels of pruned_attention: one product more and one exponential more per score, in the
// forward and in the backward. Names as in docs/attention_distill.md.
#pragma once
#include "cpu/isa/attention_distill.h"
#include "cpu/isa/pruned_attention_kernel.h"

namespace kdfast::cpu {
namespace {

inline AttentionHead<float> student_of(const DistillHead<float>& head) {
  const ScoreSide<float>& side = head.student;
  return {side.q,     side.k,     head.v,   head.span,   side.dim,
          side.scale, side.table, head.pad, {nullptr, 0}};
}

inline Reading reading_of(const ScoreSide<float>& side, bool query) {
  return {side.dim, &side.table, query && side.scale < 0 ? -1.0f : 1.0f};
}

// exponential<6>, but the error does not grow with x.
inline Vec16 exact_exponential(Vec16 x) {
  const Vec16 log2e = splat16(1.44269504088896341f), y = max16(x, splat16(-1e6f));
  const Vec16 r = round16(y * log2e);
  return scale16(exp2_poly<6>(fms16(y, log2e, r)), r);
}

template <class T, class M>
struct RiderForward : Forward<T, M> {
  using Base = Forward<T, M>;
  using Base::buffer, Base::n, Base::p, Base::pads, Base::scores, Base::stride, Base::strip,
      Base::total, Base::vectors;
  const DistillHead<float>& task;
  const ScoreSide<float>& teacher = task.teacher;
  const Sizes<M> other{teacher.dim};
  int32_t *teacher_keys, *teacher_block;
  float *teacher_scores, *teacher_buffer;

  static int64_t bytes(int64_t n, int64_t dim, int64_t teacher_dim) {
    const Sizes<M> s(teacher_dim);
    const int64_t dwords = s.lanes(n) + Base::kBlock * s.width +
                           M::kRows * (round_up(n, kVector) + kVector) + s.width * M::kPair;
    return round_up(Base::bytes(n, dim), 64) + dwords * 4 + 4 * 64;
  }

  RiderForward(const AttentionHead<float>& h, const DistillHead<float>& d, char* scratch)
      : Base(h, scratch), task(d) {
    scratch += round_up(Base::bytes(n, h.dim), 64);
    teacher_keys = take<int32_t>(scratch, other.lanes(n));
    teacher_block = take<int32_t>(scratch, Base::kBlock * other.width);
    teacher_scores = take<float>(scratch, M::kRows * strip);
    teacher_buffer = take<float>(scratch, other.width * M::kPair);
  }

  void pack_teacher() {
    const T* k = static_cast<const T*>(teacher.k.data);
    Walk key(task.span, 0);
    for (int64_t first = 0; first < n; first += kVector) {
      const int64_t count = n - first < kVector ? n - first : kVector;
      pack_rows<T, M>(k, teacher.k.step, key, count, kVector, reading_of(teacher, false),
                      teacher_buffer, teacher_block);
      to_lanes(teacher_block, other.width, first, vectors * kVector, other.steps, teacher_keys);
    }
  }

  void score_teacher(int64_t count) {
    for (int64_t first = 0; first < vectors; first += kWide) {
      const int64_t wide = vectors - first < kWide ? vectors - first : kWide;
      M::scores(teacher_block, other.width, count, teacher_keys + first * kVector * other.steps,
                wide * kVector, other.steps, teacher_scores + first * kVector, strip);
    }
  }

  float top_of(const float* x, float c) const {
    const Mask16 last = tail_mask(n - (vectors - 1) * kVector);
    Vec16 top = splat16(-INFINITY);
    for (int64_t v = 0; v + 1 < vectors; ++v) top = max16(top, load16(x + v * kVector));
    const float m = top16(max16(last, top, load16(x + (vectors - 1) * kVector))) * c;
    return task.span.pads && m < 0 ? 0 : m;
  }

  // Weights of row r as Forward::weigh leaves them, and the row's statistics; returns its distance.
  double weigh(int r, float* stats) {
    const float *s = scores + r * strip, *t = teacher_scores + r * strip;
    const float cs = fabsf(task.student.scale), ct = fabsf(teacher.scale);
    const float ms = top_of(s, cs), mt = top_of(t, ct);
    const Vec16 student_scale = splat16(cs), student_top = splat16(ms);
    const Vec16 teacher_scale = splat16(ct), teacher_top = splat16(mt);
    Vec16 sum_p = zero16(), sum_r = zero16(), sum_d = zero16();
    const auto add = [&](int64_t v, Mask16 real) {
      const Vec16 x = fms16(load16(s + v * kVector), student_scale, student_top);
      const Vec16 y = fms16(load16(t + v * kVector), teacher_scale, teacher_top);
      // A loss needs more digits than weights that are rounded to bf16.
      const Vec16 e = keep16(real, exact_exponential(x));
      const Vec16 f = keep16(real, exact_exponential(y));
      sum_p = sum_p + e;
      sum_r = sum_r + f;
      sum_d = fma16(f, y - x, sum_d);
      return e;
    };
    int32_t* to = p + r * stride;
    const Mask16 all = tail_mask(kVector), last = tail_mask(n - (vectors - 1) * kVector);
    for (int64_t v = 0; v < vectors; v += 2) {
      const Vec16 a = add(v, v + 1 < vectors ? all : last);
      const Vec16 b = v + 1 < vectors ? add(v + 1, v + 2 < vectors ? all : last) : zero16();
      M::store2(to + v * kVector / M::kPair, a, b);
    }
    const float count = static_cast<float>(task.span.pads), weight = count * expf(-mt);
    pads[r] = task.span.pads ? count * expf(-ms) : 0.0f;
    total[r] = sum16(sum_p) + pads[r];
    const float other_total = sum16(sum_r) + (task.span.pads ? weight : 0.0f);
    const float distance = sum16(sum_d) + (task.span.pads ? weight * (ms - mt) : 0.0f);
    const double log_p = log(double(total[r])), log_r = log(double(other_total));
    const int64_t step = task.stats_step;
    stats[kTop * step] = ms;
    stats[kLogSum * step] = stats[kMapLogSum * step] = static_cast<float>(log_p);
    stats[kTeacherTop * step] = mt;
    stats[kTeacherLogSum * step] = static_cast<float>(log_r);
    return log_p - log_r + double(distance) / double(other_total);
  }

  double run(MutableRows to) {
    [[maybe_unused]] const typename M::Session session;
    this->pack();
    pack_teacher();
    const T* q = static_cast<const T*>(task.student.q.data);
    const T* tq = static_cast<const T*>(teacher.q.data);
    Walk query(task.span, 0), teacher_query = query, result = query;
    double loss = 0;
    for (int64_t i = 0; i < n; i += M::kRows) {
      const int64_t count = n - i < M::kRows ? n - i : M::kRows;
      pack_rows<T, M>(q, task.student.q.step, query, count, M::kRows,
                      reading_of(task.student, true), buffer, this->block);
      this->score(count);
      pack_rows<T, M>(tq, teacher.q.step, teacher_query, count, M::kRows, reading_of(teacher, true),
                      teacher_buffer, teacher_block);
      score_teacher(count);
      T* out[M::kRows];
      for (int r = 0; r < count; ++r, result.next()) {
        loss += weigh(r, task.stats + result.token());
        out[r] = static_cast<T*>(to.data) + result.token() * to.step;
      }
      this->apply(count, out);
    }
    return loss;
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
struct RiderBackward : Backward<T, M> {
  using Base = Backward<T, M>;
  using Base::chunk, Base::delta, Base::dp, Base::ds, Base::ds_pairs, Base::n, Base::p,
      Base::scores, Base::stride;

  // dS is rounded to what its products take.
  static Vec16 exp_of(Vec16 x) {
    if constexpr (M::kDegree == 6) return exact_exponential(x);
    return exponential<M::kDegree>(x);
  }

  const DistillHead<float>& task;
  const ScoreSide<float>& teacher = task.teacher;
  const Sizes<M> other{teacher.dim};
  float weight;  // of the loss
  int32_t *teacher_k, *teacher_lanes, *teacher_block;
  // Per query: the maximum of its scores is Base::lse, and 1 / (sum of the exponentials above it).
  float *teacher_buffer, *teacher_scores, *share, *teacher_top, *teacher_share;

  static int64_t bytes(int64_t n, int64_t dim, int64_t teacher_dim) {
    const Sizes<M> s(teacher_dim);
    const int64_t m = query_chunk(n), rows = round_up(n, M::kKeys);
    const int64_t dwords =
        (rows + kVector) * s.width + s.lanes(m) + s.width * M::kPair + M::kRows * kPanel + 3 * m;
    return round_up(Base::bytes(n, dim), 64) + dwords * 4 + 8 * 64;
  }

  RiderBackward(const AttentionHead<float>& h, const AttentionGrad<float>& g,
                const DistillHead<float>& d, float w, char* scratch)
      : Base(h, g, scratch), task(d), weight(w) {
    scratch += round_up(Base::bytes(n, h.dim), 64);
    const int64_t rows = round_up(n, M::kKeys);
    teacher_k = take<int32_t>(scratch, rows * other.width);
    teacher_block = take<int32_t>(scratch, kVector * other.width);
    teacher_lanes = take<int32_t>(scratch, other.lanes(chunk));
    teacher_buffer = take<float>(scratch, other.width * M::kPair);
    teacher_scores = take<float>(scratch, M::kRows * kPanel);
    share = take<float>(scratch, chunk);
    teacher_top = take<float>(scratch, chunk);
    teacher_share = take<float>(scratch, chunk);
    Walk key(task.span, 0);
    pack_rows<T, M>(static_cast<const T*>(teacher.k.data), teacher.k.step, key, n, rows,
                    reading_of(teacher, false), teacher_buffer, teacher_k);
  }

  void pack_queries(int64_t begin, int64_t count) {
    Base::pack_queries(begin, count);
    const T* q = static_cast<const T*>(teacher.q.data);
    const int64_t lanes = round_up(count, kVector), step = task.stats_step;
    Walk query(task.span, begin), walk = query;
    for (int64_t first = 0; first < lanes; first += kVector) {
      const int64_t some = count - first < kVector ? count - first : kVector;
      pack_rows<T, M>(q, teacher.q.step, query, some, kVector, reading_of(teacher, true),
                      teacher_buffer, teacher_block);
      to_lanes(teacher_block, other.width, first, lanes, other.steps, teacher_lanes);
    }
    for (int64_t i = 0; i < count; ++i, walk.next()) {
      const float* stats = task.stats + walk.token();
      share[i] = stats[kLogSum * step];
      teacher_top[i] = stats[kTeacherTop * step];
      teacher_share[i] = stats[kTeacherLogSum * step];
    }
    // A lane without a query gets P = R = 0.
    for (int64_t i = count; i < lanes; ++i) share[i] = teacher_top[i] = teacher_share[i] = 1e30f;
    for (int64_t i = 0; i < lanes; i += kVector) {
      store16(share + i, exact_exponential(zero16() - load16(share + i)));
      store16(teacher_share + i, exact_exponential(zero16() - load16(teacher_share + i)));
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
    for (int64_t v = 0; v < wide; v += 2) {
      const int64_t to = at * stride + (lane + v * kVector) / M::kPair;
      int32_t* pairs =
          M::kPair == 1 ? nullptr : ds_pairs + above / 2 * this->pair_stride + lane + v * kVector;
      columns(key, lane + v * kVector, v * kVector, v + 1 < wide, to, pairs);
    }
  }

  // As Base::columns, for the scores at `from`, with w (P - R) in dS.
  void columns(int64_t key, int64_t lane, int64_t from, bool two, int64_t to, int32_t* pairs) {
    const Mask16 second = all_or_none(two);
    const Lanes first{*this, lane, tail_mask(kVector)}, next{*this, lane + kVector, second};
    const float *s = scores + from, *t = teacher_scores + from, *g = dp + from;
    Vec16 above[2];
#pragma GCC unroll 8
    for (int r = 0; r < M::kRows; ++r, s += kPanel, t += kPanel, g += kPanel, to += stride) {
      const Mask16 real = all_or_none(key + r < n);
      Vec16 p0, p1;
      const Vec16 d0 = first.gradient(s, t, g, real, &p0);
      const Vec16 d1 =
          next.gradient(s + kVector, t + kVector, g + kVector, both(real, second), &p1);
      M::store2(p + to, p0, p1);
      M::store2(ds + to, d0, d1);
      if constexpr (M::kPair == 2) {
        if (r % 2) {
          M::store_pairs(pairs, above[0], d0);
          M::store_pairs(pairs + kVector, above[1], d1);
          pairs += this->pair_stride;
        }
        above[0] = d0;
        above[1] = d1;
      }
    }
  }

  // What 16 queries share over all keys.
  struct Lanes {
    Vec16 scale, top, share, teacher_scale, teacher_top, teacher_share, delta, weight;

    Lanes(const RiderBackward& b, int64_t lane, Mask16 m)
        : scale(splat16(b.c)),
          top(load16(b.lse + lane, m)),
          share(load16(b.share + lane, m)),
          teacher_scale(splat16(fabsf(b.teacher.scale))),
          teacher_top(load16(b.teacher_top + lane, m)),
          teacher_share(load16(b.teacher_share + lane, m)),
          delta(load16(b.delta + lane, m)),
          weight(splat16(b.weight)) {}

    // P and dS of one key; both are zero and no more than that where it is not `real`.
    Vec16 gradient(const float* s, const float* t, const float* g, Mask16 real, Vec16* p) const {
      const Vec16 x = fms16(load16(s), scale, top),
                  y = fms16(load16(t), teacher_scale, teacher_top);
      *p = keep16(real, exp_of(x) * share);
      const Vec16 over = *p - exp_of(y) * teacher_share;
      return keep16(real, fma16(weight, over, *p * (load16(g) - delta)));
    }
  };
};

template <class T, class M>
struct Rider {
  static int64_t scratch_bytes(int64_t n, int64_t dim, int64_t teacher_dim) {
    const int64_t forward = RiderForward<T, M>::bytes(n, dim, teacher_dim);
    const int64_t backward = sums_bytes(n, dim) + RiderBackward<T, M>::bytes(n, dim, teacher_dim);
    return forward > backward ? forward : backward;
  }
  static int64_t sums_bytes(int64_t n, int64_t dim) {
    return round_up(2 * sum_rows(n) * sum_columns(dim) * static_cast<int64_t>(sizeof(float)), 64);
  }

  static double forward(const DistillHead<float>& head, MutableRows out, char* scratch) {
    return RiderForward<T, M>(student_of(head), head, scratch).run(out);
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
    RiderBackward<T, M> rider(student, own, head, grad.weight,
                              scratch + sums_bytes(n, head.student.dim));
    rider.run_as(rider, 0, n, true, sums);
    backward_keys<T>(student, own, sums, 1);
    if (head.span.pads == 0) return;
    Walk walk(head.span, 0);
    for (int64_t i = 0; i < n; ++i, walk.next()) {
      const float* stats = head.stats + walk.token();
      const float log_sum = stats[kTop * head.stats_step] + stats[kLogSum * head.stats_step];
      rider.add_pad(static_cast<const T*>(grad.grad.data) + walk.token() * grad.grad.step,
                    static_cast<float>(head.span.pads) * expf(-log_sum));
    }
  }
};

template <class T, class M>
DistillKernel<float> rider_kernel() {
  using R = Rider<T, M>;
  return {&R::scratch_bytes, &R::forward, &R::backward};
}

}  // namespace
}  // namespace kdfast::cpu
