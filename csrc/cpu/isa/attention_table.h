// SPDX-License-Identifier: Apache-2.0
// The attention kernels over one kind of products, for whatever instruction set the including file
// is compiled for. In the order of Element: f64, f32, bf16, f16.
#pragma once
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"
#include "cpu/isa/pruned_attention_kernel.h"
#include "cpu/kernels.h"

namespace kdfast::cpu {
namespace {

// Products of fp32: M those of pruned_attention, D those of the other two ops.
template <class M, class D>
constexpr AttentionKernels<float> fp32_table() {
  return {
      .attention = {{},
                    attention_kernel<float, M>(),
                    attention_kernel<Bf16, M>(),
                    attention_kernel<Half, M>()},
      .distill = {{},
                  distill_tiles<float, D>(),
                  distill_tiles<Bf16, D>(),
                  distill_tiles<Half, D>()},
      .entropy = entropy_tiles<D>(),
  };
}

// Products of bf16: of bf16 elements, or of f32 ones that are rounded.
template <class M>
constexpr AttentionKernels<float> bf16_table() {
  return {
      .attention = {{}, attention_kernel<float, M>(), attention_kernel<Bf16, M>(), {}},
      .distill = {{}, distill_tiles<float, M>(), distill_tiles<Bf16, M>(), {}},
      .entropy = entropy_tiles<M>(),
  };
}

// f32 and f16: products of their upper and lower bf16; see split_math.h.
template <class M>
constexpr AttentionKernels<float> split_table() {
  return {
      .attention = {{}, attention_kernel<float, M>(), {}, attention_kernel<Half, M>()},
      .distill = {{}, distill_tiles<float, M>(), {}, distill_tiles<Half, M>()},
      .entropy = {},
  };
}

}  // namespace
}  // namespace kdfast::cpu
