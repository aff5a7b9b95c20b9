// SPDX-License-Identifier: Apache-2.0
// Students of fp64, on any CPU.
#include "cpu/isa/attention_distill_kernel.h"
#include "cpu/isa/attention_entropy_kernel.h"

namespace kdfast::cpu {
DistillKernel<double> distill_generic_f64() { return distill_kernel<double>(); }
EntropyKernel<double> entropy_generic_f64() { return entropy_kernel<double>(); }
}  // namespace kdfast::cpu
