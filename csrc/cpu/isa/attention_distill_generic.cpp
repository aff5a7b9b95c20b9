// SPDX-License-Identifier: Apache-2.0
// All element types with products in fp32: any CPU.
#include "cpu/isa/attention_distill_backward.h"
#include "cpu/isa/attention_entropy_tiles.h"
#include "cpu/isa/short_chains.h"

namespace kdfast::cpu {

DistillKernel<float> distill_generic(Element student) {
  switch (student) {
    case Element::bf16: return distill_tiles<Bf16, ShortChains>();
    case Element::f16: return distill_tiles<Half, ShortChains>();
    default: return distill_tiles<float, ShortChains>();
  }
}
EntropyKernel<float> entropy_generic() { return entropy_tiles<ShortChains>(); }

}  // namespace kdfast::cpu
