// SPDX-License-Identifier: Apache-2.0
// The kernels of element type T over the products M, for the including file's instruction set.
#pragma once
#include "cpu/isa/pruned_attention_backward.h"
#include "cpu/isa/pruned_attention_forward.h"

namespace kdfast::cpu {
namespace {

template <class T, class M>
constexpr AttentionKernel<float> attention_kernel() {
  return {&Forward<T, M>::bytes,
          [](const AttentionHead<float>& head, int64_t begin, int64_t end, MutableRows out,
             float* lse, char* scratch) { Forward<T, M>(head, scratch).run(begin, end, out, lse); },
          &Backward<T, M>::bytes,
          [](const AttentionHead<float>& head, const AttentionGrad<float>& grad, int64_t begin,
             int64_t end, bool first, float* sums,
             char* scratch) { Backward<T, M>(head, grad, scratch).run(begin, end, first, sums); },
          &backward_keys<T>};
}

}  // namespace
}  // namespace kdfast::cpu
