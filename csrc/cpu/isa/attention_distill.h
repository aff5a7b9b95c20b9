// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of attention_distill compute. See docs/ops/attention_distill.md.
#pragma once
#include <cstdint>

#include "cpu/isa/pruned_attention.h"

namespace kdfast::cpu {

enum class MapLoss { kl, reverse_kl, jsd, mse, cosine, logit_mse };
// What a row keeps for the backward, in this order; how many of them each MapLoss has. The docs
// page and STATS in kdfast/ops/attention_distill.py say the same. The tops of fp32 kernels are
// those of products that the scale does not multiply yet, since rounding makes them differ at large
// ones.
enum RowStat { kTop, kLogSum, kMapLogSum, kTeacherTop, kTeacherLogSum, kFirstSum, kSecondSum };
constexpr int64_t kMapStats[] = {5, 6, 6, 6, 7, 2};

// q and k of one head inside one window; A: float, or double if the student is f64.
template <class A>
struct ScoreSide {
  Rows q, k;
  Element element;
  int64_t dim;
  A scale;
  RotaryTable<A> table;
};

// One kept head of one image inside one window, and the teacher's.
template <class A>
struct DistillHead {
  ScoreSide<A> student, teacher;
  Rows v;
  WindowSpan span;
  const A* pad;  // (D,) value of the span.pads padded keys
  A inv_temperature;
  MapLoss kind;
  A* stats;  // per token; `stats_step` from one statistic to the next
  int64_t stats_step;
};

template <class A>
struct DistillGrad {
  A weight;  // upstream gradient of the sum of the row distances
  Rows grad, out;
  MutableRows dq, dk, dv;
  A* dpad;  // (D,), added to
};

template <class A>
struct DistillKernel {
  int64_t (*scratch_bytes)(int64_t tokens, int64_t dim, int64_t teacher_dim);
  // Writes out and stats; returns the sum of the row distances.
  double (*forward)(const DistillHead<A>& head, MutableRows out, char* scratch);
  void (*backward)(const DistillHead<A>& head, const DistillGrad<A>& grad, char* scratch);
};

}  // namespace kdfast::cpu
