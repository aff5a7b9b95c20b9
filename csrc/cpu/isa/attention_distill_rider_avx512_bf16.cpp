// SPDX-License-Identifier: Apache-2.0
// The rider for bf16 with products in bf16 and sums in fp32: AVX-512 with AVX512_BF16.
#include "cpu/isa/attention_distill_rider.h"
#include "cpu/isa/bf16_math.h"
#include "cpu/isa/register_tiles.h"

namespace kdfast::cpu {

DistillKernel<float> rider_avx512_bf16() { return rider_kernel<Bf16, RegisterTiles<Bf16Math>>(); }

}  // namespace kdfast::cpu
