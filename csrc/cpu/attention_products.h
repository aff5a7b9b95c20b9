// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/Context.h>

#include "cpu/kernels.h"

namespace kdfast::cpu {

// What the products of an attention call are made of, by the element type of what is multiplied.
// fp32 follows the setting that torch's own matrix product on the CPU reads, when it is called:
// torch.backends.mkldnn.matmul.fp32_precision, which torch.set_float32_matmul_precision sets too.
inline Products products_of(Element element) {
  if (element == Element::bf16) return Products::bf16;
  // In one bf16 it would lose three bits; in two it loses none.
  if (element == Element::f16) return Products::split;
  const auto& context = at::globalContext();
  if (!context.userEnabledMkldnn()) return Products::fp32;
  switch (context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL)) {
    case at::Float32Precision::BF16: return Products::bf16;
    case at::Float32Precision::TF32: return Products::split;
    default: return Products::fp32;
  }
}

// The kernels with sums of type A over such products; of double there is one kind.
template <class A>
const AttentionKernels<A>& attention_kernels([[maybe_unused]] Products products) {
  if constexpr (sizeof(A) == sizeof(double))
    return attention_f64;
  else
    return *kernels().attention[static_cast<int>(products)];
}

}  // namespace kdfast::cpu
