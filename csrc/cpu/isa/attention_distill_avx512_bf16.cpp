// SPDX-License-Identifier: Apache-2.0
// bf16 with products in bf16 and sums in fp32: AVX-512 with AVX512_BF16.
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"
#include "cpu/isa/bf16_math.h"
#include "cpu/isa/register_tiles.h"

namespace kdfast::cpu {

DistillKernel<float> distill_avx512_bf16() {
  return distill_tiles<Bf16, RegisterTiles<Bf16Math>>();
}
EntropyKernel<float> entropy_avx512_bf16() { return entropy_tiles<RegisterTiles<Bf16Math>>(); }

}  // namespace kdfast::cpu
