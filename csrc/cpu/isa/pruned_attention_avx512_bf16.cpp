// SPDX-License-Identifier: Apache-2.0
// bf16 and fp32 with products in bf16 and sums in fp32: AVX-512 with AVX512_BF16.
#include "cpu/isa/bf16_math.h"
#include "cpu/isa/pruned_attention_kernel.h"
#include "cpu/isa/register_tiles.h"

namespace kdfast::cpu {

AttentionKernel<float> attention_avx512_bf16(Element element) {
  using Products = RegisterTiles<Bf16Math>;
  return element == Element::f32 ? attention_kernel<float, Products>()
                                 : attention_kernel<Bf16, Products>();
}

}  // namespace kdfast::cpu
