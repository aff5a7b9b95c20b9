// SPDX-License-Identifier: Apache-2.0
// bf16 and fp32 with products in AMX tiles.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"

namespace kdfast::cpu {

DistillKernel<float> distill_amx(Element student) {
  using Products = AmxTiles<HardwareTiles>;
  return student == Element::f32 ? distill_tiles<float, Products>()
                                 : distill_tiles<Bf16, Products>();
}
EntropyKernel<float> entropy_amx() { return entropy_tiles<AmxTiles<HardwareTiles>>(); }

}  // namespace kdfast::cpu
