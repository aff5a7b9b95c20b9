// SPDX-License-Identifier: Apache-2.0
// All element types with products of bf16 in AMX tiles.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"

namespace kdfast::cpu {

DistillKernel<float> distill_amx(Element student) {
  using Products = AmxTiles<HardwareTiles>;
  return student == Element::f32 ? distill_tiles<float, Products>()
                                 : distill_tiles<Bf16, Products>();
}
DistillKernel<float> distill_amx_split(Element student) {
  using Products = AmxTiles<HardwareTiles, SplitMath>;
  return student == Element::f32 ? distill_tiles<float, Products>()
                                 : distill_tiles<Half, Products>();
}
EntropyKernel<float> entropy_amx() { return entropy_tiles<AmxTiles<HardwareTiles>>(); }

}  // namespace kdfast::cpu
