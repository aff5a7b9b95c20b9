// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/attention_distill_kernel.h"

namespace kdfast::cpu {
DistillKernel<float> distill_avx2() { return distill_kernel<float>(); }
}  // namespace kdfast::cpu
