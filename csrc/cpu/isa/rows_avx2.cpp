// SPDX-License-Identifier: Apache-2.0
// Row kernels for AVX2, FMA and F16C.
#include "cpu/isa/row_table.h"

namespace kdfast::cpu {
constinit const RowKernels rows_avx2 = kRowKernels;
}  // namespace kdfast::cpu
