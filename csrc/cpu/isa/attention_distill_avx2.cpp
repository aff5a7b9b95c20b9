// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/attention_distill_kernel.h"
#include "cpu/isa/attention_entropy_kernel.h"

namespace kdfast::cpu {
DistillKernel<float> distill_avx2() { return distill_kernel<float>(); }
EntropyKernel<float> entropy_avx2() { return entropy_kernel<float>(); }
}  // namespace kdfast::cpu
