// SPDX-License-Identifier: Apache-2.0
// All element types with products of bf16 in AMX tiles and sums in fp32.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/pruned_attention_kernel.h"

namespace kdfast::cpu {

AttentionKernel<float> attention_amx(Element element) {
  using Products = AmxTiles<HardwareTiles>;
  return element == Element::f32 ? attention_kernel<float, Products>()
                                 : attention_kernel<Bf16, Products>();
}

AttentionKernel<float> attention_amx_split(Element element) {
  using Products = AmxTiles<HardwareTiles, SplitMath>;
  return element == Element::f32 ? attention_kernel<float, Products>()
                                 : attention_kernel<Half, Products>();
}

}  // namespace kdfast::cpu
