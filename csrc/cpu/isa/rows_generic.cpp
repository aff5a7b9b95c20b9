// SPDX-License-Identifier: Apache-2.0
// Row kernels for any CPU.
#include "cpu/isa/row_table.h"

namespace kdfast::cpu {
constinit const RowKernels rows_generic = kRowKernels;
}  // namespace kdfast::cpu
