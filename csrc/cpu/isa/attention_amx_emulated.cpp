// SPDX-License-Identifier: Apache-2.0
// The kernels for AMX on AVX-512 in place of the tiles: for tests, slower than those without tiles.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/attention_table.h"

namespace kdfast::cpu {
constinit const AttentionKernels<float> attention_amx_emulated =
    bf16_table<AmxTiles<EmulatedTiles>>();
constinit const AttentionKernels<float> attention_amx_emulated_split =
    split_table<AmxTiles<EmulatedTiles, SplitMath>>();
}  // namespace kdfast::cpu
