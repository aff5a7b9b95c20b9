// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of attention_entropy compute.
#pragma once
#include "cpu/isa/attention_distill.h"

namespace kdfast::cpu {

template <class A>
struct EntropyKernel {
  int64_t (*scratch_bytes)(int64_t tokens, int64_t dim);
  // Writes the entropy of the attention of every query of a head's window to out[token].
  void (*rows)(const ScoreSide<A>& side, const WindowSpan& span, A* out, char* scratch);
};

}  // namespace kdfast::cpu
