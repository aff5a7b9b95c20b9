// SPDX-License-Identifier: Apache-2.0
// Row kernels for AVX-512 F, BW, DQ, VL and FMA.
#include "cpu/isa/row_table.h"

namespace kdfast::cpu {
constinit const RowKernels rows_avx512 = kRowKernels;
}  // namespace kdfast::cpu
