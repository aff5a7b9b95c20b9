// SPDX-License-Identifier: Apache-2.0
// Attention with products of bf16 in AMX tiles and sums in fp32.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_table.h"

namespace kdfast::cpu {
constinit const AttentionKernels<float> attention_amx = bf16_table<AmxTiles<HardwareTiles>>();
constinit const AttentionKernels<float> attention_amx_split =
    split_table<AmxTiles<HardwareTiles, SplitMath>>();
}  // namespace kdfast::cpu
