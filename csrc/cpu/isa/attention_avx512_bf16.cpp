// SPDX-License-Identifier: Apache-2.0
// Attention of bf16 and fp32 with products in bf16 and sums in fp32: AVX-512 with AVX512_BF16.
#include "cpu/isa/attention_table.h"
#include "cpu/isa/bf16_math.h"
#include "cpu/isa/register_tiles.h"

namespace kdfast::cpu {
constinit const AttentionKernels<float> attention_avx512_bf16 =
    bf16_table<RegisterTiles<Bf16Math>>();
}  // namespace kdfast::cpu
