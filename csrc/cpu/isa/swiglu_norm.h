// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "elem.h"

namespace kdfast::cpu {

// Everything but the rows to do. Strides are in elements; a row's channels are contiguous. What has
// no type is of elem's; A is the accumulator: float, or double for f64.
struct SwigluNormArgs {
  Elem elem;
  const void* gate;    // (rows, channels)
  const void* value;   // (rows, channels)
  const void* grad;    // (rows, channels), backward only
  const void* weight;  // (channels) of A
  const void* bias;    // (channels) of A, forward only
  void* out;           // (rows, channels) contiguous, forward only
  void* dgate;         // (rows, channels) contiguous, backward only
  void* dvalue;        // likewise
  void* mean;          // (rows) of A, written by the forward
  void* rstd;          // likewise
  int64_t channels, gate_stride, value_stride, grad_stride;
  double eps;
  bool streamed;  // whether the results are too large to be kept in cache
};

// scratch: (channels) of A.
void swiglu_norm_rows_generic(const SwigluNormArgs& args, int64_t begin, int64_t end,
                              void* scratch);
void swiglu_norm_rows_avx2(const SwigluNormArgs& args, int64_t begin, int64_t end, void* scratch);
void swiglu_norm_rows_avx512(const SwigluNormArgs& args, int64_t begin, int64_t end, void* scratch);

// scratch: (channels) of A. `sums` (2, channels) of A, the gradients by weight and bias of these
// rows, is overwritten.
void swiglu_norm_bwd_rows_generic(const SwigluNormArgs& args, int64_t begin, int64_t end,
                                  void* scratch, void* sums);
void swiglu_norm_bwd_rows_avx2(const SwigluNormArgs& args, int64_t begin, int64_t end,
                               void* scratch, void* sums);
void swiglu_norm_bwd_rows_avx512(const SwigluNormArgs& args, int64_t begin, int64_t end,
                                 void* scratch, void* sums);

}  // namespace kdfast::cpu
