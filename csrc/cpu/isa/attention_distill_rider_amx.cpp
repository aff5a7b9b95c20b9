// SPDX-License-Identifier: Apache-2.0
// The rider for bf16 with products in AMX tiles.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_distill_rider.h"

namespace kdfast::cpu {

DistillKernel<float> rider_amx() { return rider_kernel<Bf16, AmxTiles<HardwareTiles>>(); }

}  // namespace kdfast::cpu
