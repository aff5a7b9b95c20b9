// SPDX-License-Identifier: Apache-2.0
// All element types but fp64 with products in fp32: any CPU.
#include "cpu/isa/pruned_attention_kernel.h"
#include "cpu/isa/register_tiles.h"

namespace kdfast::cpu {

AttentionKernel<float> attention_generic(Element element) {
  switch (element) {
    case Element::bf16: return attention_kernel<Bf16, RegisterTiles<Fp32Math>>();
    case Element::f16: return attention_kernel<Half, RegisterTiles<Fp32Math>>();
    default: return attention_kernel<float, RegisterTiles<Fp32Math>>();
  }
}

}  // namespace kdfast::cpu
