// SPDX-License-Identifier: Apache-2.0
// The kernel for AMX on AVX-512 in place of the tiles: for tests, slower than the one without
// tiles.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/pruned_attention_kernel.h"

namespace kdfast::cpu {

AttentionKernel<float> attention_amx_emulated(Element element) {
  using Products = AmxTiles<EmulatedTiles>;
  return element == Element::f32 ? attention_kernel<float, Products>()
                                 : attention_kernel<Bf16, Products>();
}

AttentionKernel<float> attention_amx_split_emulated(Element element) {
  using Products = AmxTiles<EmulatedTiles, SplitMath>;
  return element == Element::f32 ? attention_kernel<float, Products>()
                                 : attention_kernel<Half, Products>();
}

}  // namespace kdfast::cpu
