// SPDX-License-Identifier: Apache-2.0
// The rider for bf16 with products in AMX tiles, which AVX-512 stands in for: for tests.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_distill_rider.h"

namespace kdfast::cpu {

DistillKernel<float> rider_amx_emulated() { return rider_kernel<Bf16, AmxTiles<EmulatedTiles>>(); }

}  // namespace kdfast::cpu
