// SPDX-License-Identifier: Apache-2.0
#include "swiglu_norm_rows.h"

namespace kdfast::cpu {

void swiglu_norm_rows_generic(const SwigluNormArgs& args, int64_t begin, int64_t end,
                              void* scratch) {
  swiglu_norm_rows(args, begin, end, scratch);
}

void swiglu_norm_bwd_rows_generic(const SwigluNormArgs& args, int64_t begin, int64_t end,
                                  void* scratch, void* sums) {
  swiglu_norm_bwd_rows(args, begin, end, scratch, sums);
}

}  // namespace kdfast::cpu
