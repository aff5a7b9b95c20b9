// SPDX-License-Identifier: Apache-2.0
// The rider for all element types with products in fp32.
#include "cpu/isa/attention_distill_rider.h"

namespace kdfast::cpu {

DistillKernel<float> rider_avx512(Element element) {
  switch (element) {
    case Element::bf16: return rider_kernel<Bf16, RegisterTiles<Fp32Math>>();
    case Element::f16: return rider_kernel<Half, RegisterTiles<Fp32Math>>();
    default: return rider_kernel<float, RegisterTiles<Fp32Math>>();
  }
}

}  // namespace kdfast::cpu
