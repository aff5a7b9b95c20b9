// SPDX-License-Identifier: Apache-2.0
// All element types with products in fp32: AVX-512 F, BW, DQ, VL and FMA.
#include "cpu/isa/pruned_attention_avx512.h"

namespace kdfast::cpu {

AttentionKernel<float> attention_avx512(Element element) {
  switch (element) {
    case Element::bf16: return avx512_kernel<Bf16, Fp32Math>();
    case Element::f16: return avx512_kernel<Half, Fp32Math>();
    default: return avx512_kernel<float, Fp32Math>();
  }
}

}  // namespace kdfast::cpu
