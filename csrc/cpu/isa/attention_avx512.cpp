// SPDX-License-Identifier: Apache-2.0
// Attention of all element types but fp64 with products in fp32: AVX-512 F, BW, DQ, VL and FMA.
#include "cpu/isa/attention_table.h"
#include "cpu/isa/register_tiles.h"
#include "cpu/isa/short_chains.h"

namespace kdfast::cpu {
constinit const AttentionKernels<float> attention_avx512 =
    fp32_table<RegisterTiles<Fp32Math>, ShortChains>();
}  // namespace kdfast::cpu
