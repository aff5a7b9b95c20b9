// SPDX-License-Identifier: Apache-2.0
#include "kd_loss_rows.h"

namespace kdfast::cpu {

void kd_loss_rows_avx2(const KdLossArgs& args, int64_t begin, int64_t end, void* scratch) {
  kd_loss_rows(args, begin, end, scratch);
}

}  // namespace kdfast::cpu
