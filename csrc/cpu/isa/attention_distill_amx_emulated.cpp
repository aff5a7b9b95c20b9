// SPDX-License-Identifier: Apache-2.0
// bf16 and fp32 with products in AMX tiles, which AVX-512 stands in for: for tests.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"

namespace kdfast::cpu {

DistillKernel<float> distill_amx_emulated(Element student) {
  using Products = AmxTiles<EmulatedTiles>;
  return student == Element::f32 ? distill_tiles<float, Products>()
                                 : distill_tiles<Bf16, Products>();
}
EntropyKernel<float> entropy_amx_emulated() { return entropy_tiles<AmxTiles<EmulatedTiles>>(); }

}  // namespace kdfast::cpu
