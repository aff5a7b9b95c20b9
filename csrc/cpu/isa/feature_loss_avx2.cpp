// SPDX-License-Identifier: Apache-2.0
#include "feature_loss_rows.h"

namespace kdfast::cpu {

void feature_loss_rows_avx2(const FeatureLossArgs& args, int64_t begin, int64_t end) {
  feature_loss_rows(args, begin, end);
}

void channel_sums_avx2(const FeatureLossArgs& args, int64_t begin, int64_t end, const void* shift,
                       void* sums) {
  channel_sums(args, begin, end, shift, sums);
}

}  // namespace kdfast::cpu
