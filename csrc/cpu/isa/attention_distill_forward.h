// SPDX-License-Identifier: Apache-2.0
// Forward of attention_distill, riding on that of pruned_attention: the teacher's scores besides
// the student's, and of both rows the weights, the distance and the statistics in one go. Names as
// in docs/ops/attention_distill.md.
#pragma once
#include "cpu/isa/attention_distill_scores.h"
#include "cpu/isa/attention_distill_terms.h"

namespace kdfast::cpu {
namespace {

inline AttentionHead<float> student_of(const DistillHead<float>& head) {
  const ScoreSide<float>& side = head.student;
  return {side.q,     side.k,     head.v,   head.span,   side.dim,
          side.scale, side.table, head.pad, {nullptr, 0}};
}

// What all rows of a head share.
struct StripTask {
  int64_t n, step;  // `step` from one statistic of a row to the next
  float pads, scale, teacher_scale, inv;
  float *own, *other;  // room for the exponentials of one row
};
// What becomes of a row besides its statistics.
struct RowSums {
  float *total, *pads;  // of the attention
};

// One row: kernel `kind` at a temperature other than 1 if `temper`.
template <class M, MapLoss kind, bool temper>
struct StripRow {
  static constexpr bool kLogits = kind == MapLoss::logit_mse;
  static constexpr bool kKeeps = !kLogits && !kOnePass<kind>;
  const StripTask& task;
  float *s, *t;
  const bool padded = task.pads > 0;
  // Maxima of the scores; differences of scores keep their symmetry by one maximum for both.
  const float peak = peak_of(s, task.n, padded), top = peak * task.scale;
  const float teacher_peak = kLogits ? 0 : peak_of(t, task.n, padded);
  const float teacher_top = teacher_peak * task.teacher_scale;
  const Anchor anchor = anchor_of(peak, task.scale, task.inv);
  const Anchor its = kLogits ? same_anchor(anchor, peak, task.scale, task.teacher_scale)
                             : anchor_of(teacher_peak, task.teacher_scale, task.inv);
  const Vec16 scale = splat16(task.scale * kLog2e), offset = splat16(anchor.offset);
  const Vec16 teacher_scale = splat16(task.teacher_scale * kLog2e);
  const Vec16 teacher_offset = splat16(its.offset), inv = splat16(task.inv);
  const int64_t vectors = divide_up(task.n, kVector);
  const Mask16 last = tail_mask(task.n - (vectors - 1) * kVector);
  // Sums of exponentials of the attention's row, of both maps', and of what the kind adds up.
  Vec16 sum = zero16(), sum_p = zero16(), sum_r = zero16(), sum_d = zero16();

  // Adds 16 keys, or of the last ones those that there are; returns their weights. A loss needs
  // more digits than weights that are rounded to bf16.
  template <bool kLast>
  __attribute__((always_inline)) inline Vec16 add(int64_t v) {
    const auto real = [&](Vec16 x) { return kLast ? keep16(last, x) : x; };
    const Vec16 x = fms16(load16(s + v * kVector), scale, offset), e = real(exp2_16<6>(x));
    const Vec16 y = fms16(load16(t + v * kVector), teacher_scale, teacher_offset);
    sum = sum + e;
    if constexpr (kLogits) {
      const Vec16 d = real(x - y);
      sum_d = fma16(d, d, sum_d);
      return e;
    }
    const Vec16 p = temper ? real(exp2_16<6>(x * inv)) : e;
    const Vec16 r = real(exp2_16<6>(temper ? y * inv : y));
    if constexpr (temper) sum_p = sum_p + p;
    sum_r = sum_r + r;
    if constexpr (kind == MapLoss::kl) sum_d = fma16(r, y - x, sum_d);
    if constexpr (kind == MapLoss::reverse_kl) sum_d = fma16(p, x - y, sum_d);
    if constexpr (kKeeps) {
      store16(task.own + v * kVector, p);
      store16(task.other + v * kVector, r);
    }
    return e;
  }

  void add_all(int32_t* to) {
    int64_t v = 0;
    for (; v + 2 < vectors; v += 2, to += 2 * kVector / M::kPair) {
      const Vec16 a = add<false>(v);
      M::store2(to, a, add<false>(v + 1));
    }
    if (v + 1 == vectors) return M::store2(to, add<true>(v), zero16());
    const Vec16 a = add<false>(v);
    M::store2(to, a, add<true>(v + 1));
  }

  // log(P / R) of scores times log2(e) above their maxima.
  Vec16 log_ratio(Vec16 x, Vec16 y, Vec16 gap) const {
    return fms16(x - y, splat16(temper ? kLn2 * task.inv : kLn2), gap);
  }

  Sums<TileMath> second_pass(float share_p, float share_r, float gap, float pad_p, float pad_r) {
    const Vec16 all_p = splat16(share_p), all_r = splat16(share_r), all_gap = splat16(gap);
    Sums<TileMath> sums{zero16(), zero16(), zero16()};
    const auto add = [&](Vec16 p, Vec16 r, Vec16 x, Vec16 y, Vec16 count) {
      const Vec16 d = kind == MapLoss::jsd ? log_ratio(x, y, all_gap) : zero16();
      const Sums<TileMath> terms = map_terms<TileMath, kind>(p * all_p, r * all_r, d);
      sums.one = fma16(count, terms.one, sums.one);
      sums.two = fma16(count, terms.two, sums.two);
      sums.three = fma16(count, terms.three, sums.three);
    };
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = v * kVector;
      add(load16(task.own + at), load16(task.other + at), fms16(load16(s + at), scale, offset),
          fms16(load16(t + at), teacher_scale, teacher_offset), splat16(1.0f));
    }
    if (padded)
      add(splat16(pad_p), splat16(pad_r), splat16(-top * kLog2e), splat16(-teacher_top * kLog2e),
          splat16(task.pads / kVector));
    return sums;
  }

  // Writes the row's weights, not divided by *total yet, and statistics; returns its distance.
  static double run(const StripTask& task, float* s, float* t, int32_t* weights, float* stats,
                    RowSums to) {
    StripRow row{task, s, t};
    center_scores(s, task.n, row.anchor.center);
    center_scores(t, task.n, row.its.center);
    row.add_all(weights);
    return row.finish(stats, to);
  }

  double finish(float* stats, RowSums to) {
    const float pads = task.pads, inv_t = temper ? task.inv : 1.0f;
    const float pad = padded ? expf(-top) : 0.0f;
    *to.pads = pads * pad;
    *to.total = sum16(sum) + *to.pads;
    const double log_sum = log(double(*to.total));
    stats[kTop * task.step] = peak;
    stats[kLogSum * task.step] = static_cast<float>(log_sum);
    const float d = sum16(sum_d);
    if constexpr (kLogits) return double(d) * kLn2 * kLn2 * task.inv * task.inv / double(task.n);
    const float pad_p = temper && padded ? expf(-top * inv_t) : pad;
    const float pad_r = padded ? expf(-teacher_top * inv_t) : 0.0f;
    const float zp = temper ? sum16(sum_p) + pads * pad_p : *to.total;
    const float zr = sum16(sum_r) + pads * pad_r;
    const double log_p = temper ? log(double(zp)) : log_sum, log_r = log(double(zr));
    stats[kMapLogSum * task.step] = static_cast<float>(log_p);
    stats[kTeacherTop * task.step] = teacher_peak;
    stats[kTeacherLogSum * task.step] = static_cast<float>(log_r);
    const double pad_d = (double(top) - double(teacher_top)) * pads;
    const double over =
        (double(d) * kLn2 + (kind == MapLoss::kl ? pad_r : -pad_p) * pad_d) * double(inv_t);
    if constexpr (kind == MapLoss::kl) return log_p - log_r + over / double(zr);
    const float gap = static_cast<float>(log_p) - static_cast<float>(log_r);
    if constexpr (kind == MapLoss::reverse_kl) {
      // Rounded as the backward's d: they cancel where P is a single 1.
      const double mean = (double(d) - pad_p * pad_d / kLn2) / double(zp);
      stats[kFirstSum * task.step] =
          top16(log_ratio(splat16(static_cast<float>(mean)), zero16(), splat16(gap)));
      return over / double(zp) - log_p + log_r;
    }
    float first, second = 0;
    const Sums<TileMath> sums = second_pass(1 / zp, 1 / zr, gap, pad_p, pad_r);
    const float distance = map_distance<float, kind>(sum16(sums.one), sum16(sums.two),
                                                     sum16(sums.three), &first, &second);
    stats[kFirstSum * task.step] = first;
    if constexpr (kind == MapLoss::cosine) stats[kSecondSum * task.step] = second;
    return distance;
  }
};

template <class T, class M>
struct DistillForward : Forward<T, M> {
  using Base = Forward<T, M>;
  using Base::n, Base::p, Base::pads, Base::scores, Base::stride, Base::strip, Base::total;
  const DistillHead<float>& task;
  ScoreStrip<M> teacher;
  StripTask rows;

  static int64_t bytes(int64_t n, int64_t dim, int64_t teacher_dim) {
    return round_up(Base::bytes(n, dim), 64) + round_up(ScoreStrip<M>::bytes(n, teacher_dim), 64) +
           2 * (4 * round_up(n, kVector) + 64);
  }

  DistillForward(const AttentionHead<float>& h, const DistillHead<float>& d, char* scratch)
      : Base(h, scratch),
        task(d),
        teacher(d.teacher, d.span, scratch + round_up(Base::bytes(n, h.dim), 64)) {
    scratch +=
        round_up(Base::bytes(n, h.dim), 64) + round_up(ScoreStrip<M>::bytes(n, d.teacher.dim), 64);
    float* own = take<float>(scratch, round_up(n, kVector));
    float* other = take<float>(scratch, round_up(n, kVector));
    rows = {n,
            d.stats_step,
            static_cast<float>(d.span.pads),
            fabsf(d.student.scale),
            fabsf(d.teacher.scale),
            d.inv_temperature,
            own,
            other};
  }

  double run(MutableRows to) {
    [[maybe_unused]] const typename M::Session session;
    this->pack();
    teacher.pack_keys();
    const auto row = with_kind(task.kind, task.inv_temperature, []<MapLoss kind, bool temper>() {
      return &StripRow<M, kind, temper>::run;
    });
    const T* q = static_cast<const T*>(task.student.q.data);
    Walk query(task.span, 0), teacher_query = query, result = query;
    double loss = 0;
    for (int64_t i = 0; i < n; i += M::kRows) {
      const int64_t count = n - i < M::kRows ? n - i : M::kRows;
      pack_rows<T, M>(q, task.student.q.step, query, count, M::kRows,
                      reading_of(task.student, true), this->buffer, this->block);
      this->score(count);
      teacher.score(teacher_query, count);
      T* out[M::kRows];
      for (int r = 0; r < count; ++r, result.next()) {
        loss += row(rows, scores + r * strip, teacher.scores + r * teacher.step, p + r * stride,
                    task.stats + result.token(), {total + r, pads + r});
        out[r] = static_cast<T*>(to.data) + result.token() * to.step;
      }
      this->apply(count, out);
    }
    return loss;
  }
};

}  // namespace
}  // namespace kdfast::cpu
