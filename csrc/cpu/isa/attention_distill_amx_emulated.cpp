// SPDX-License-Identifier: Apache-2.0
// bf16 with products in AMX tiles, which AVX-512 stands in for: for tests.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"

namespace kdfast::cpu {

DistillKernel<float> distill_amx_emulated() {
  return distill_tiles<Bf16, AmxTiles<EmulatedTiles>>();
}
EntropyKernel<float> entropy_amx_emulated() { return entropy_tiles<AmxTiles<EmulatedTiles>>(); }

}  // namespace kdfast::cpu
