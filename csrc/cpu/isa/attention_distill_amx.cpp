// SPDX-License-Identifier: Apache-2.0
// bf16 with products in AMX tiles.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"

namespace kdfast::cpu {

DistillKernel<float> distill_amx() { return distill_tiles<Bf16, AmxTiles<HardwareTiles>>(); }
EntropyKernel<float> entropy_amx() { return entropy_tiles<AmxTiles<HardwareTiles>>(); }

}  // namespace kdfast::cpu
