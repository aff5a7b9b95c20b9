// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/attention_distill_kernel.h"
#include "cpu/isa/attention_entropy_kernel.h"

namespace kdfast::cpu {
DistillKernel<double> distill_generic_f64() { return distill_kernel<double>(); }
DistillKernel<float> distill_generic() { return distill_kernel<float>(); }
EntropyKernel<double> entropy_generic_f64() { return entropy_kernel<double>(); }
EntropyKernel<float> entropy_generic() { return entropy_kernel<float>(); }
}  // namespace kdfast::cpu
