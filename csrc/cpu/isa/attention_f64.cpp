// SPDX-License-Identifier: Apache-2.0
// Attention of fp64, on any CPU.
#include "cpu/isa/attention_distill_kernel.h"
#include "cpu/isa/attention_entropy_kernel.h"
#include "cpu/isa/pruned_attention_f64.h"
#include "cpu/kernels.h"

namespace kdfast::cpu {
constinit const AttentionKernels<double> attention_f64 = {
    .attention = {{&forward_bytes, &forward, &backward_bytes, &backward, &backward_keys}},
    .distill = {distill_kernel<double>()},
    .entropy = entropy_kernel<double>(),
};
}  // namespace kdfast::cpu
