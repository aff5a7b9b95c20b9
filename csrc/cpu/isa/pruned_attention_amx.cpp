// SPDX-License-Identifier: Apache-2.0
// bf16 with products in AMX tiles and sums in fp32.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/pruned_attention_kernel.h"

namespace kdfast::cpu {

AttentionKernel<float> attention_amx() { return attention_kernel<Bf16, AmxTiles<HardwareTiles>>(); }

}  // namespace kdfast::cpu
