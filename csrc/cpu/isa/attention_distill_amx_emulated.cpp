// SPDX-License-Identifier: Apache-2.0
// All element types with products of bf16 in AMX tiles, which AVX-512 stands in for: for tests.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"

namespace kdfast::cpu {

DistillKernel<float> distill_amx_emulated(Element student) {
  using Products = AmxTiles<EmulatedTiles>;
  return student == Element::f32 ? distill_tiles<float, Products>()
                                 : distill_tiles<Bf16, Products>();
}
DistillKernel<float> distill_amx_split_emulated(Element student) {
  using Products = AmxTiles<EmulatedTiles, SplitMath>;
  return student == Element::f32 ? distill_tiles<float, Products>()
                                 : distill_tiles<Half, Products>();
}
EntropyKernel<float> entropy_amx_emulated() { return entropy_tiles<AmxTiles<EmulatedTiles>>(); }

}  // namespace kdfast::cpu
