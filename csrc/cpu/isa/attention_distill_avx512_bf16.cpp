// SPDX-License-Identifier: Apache-2.0
// bf16 and fp32 with products in bf16 and sums in fp32: AVX-512 with AVX512_BF16.
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"
#include "cpu/isa/bf16_math.h"
#include "cpu/isa/register_tiles.h"

namespace kdfast::cpu {

DistillKernel<float> distill_avx512_bf16(Element student) {
  using Products = RegisterTiles<Bf16Math>;
  return student == Element::f32 ? distill_tiles<float, Products>()
                                 : distill_tiles<Bf16, Products>();
}
EntropyKernel<float> entropy_avx512_bf16() { return entropy_tiles<RegisterTiles<Bf16Math>>(); }

}  // namespace kdfast::cpu
