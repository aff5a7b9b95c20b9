// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "elements.h"

namespace kdfast::cpu {

// Everything but the rows to do. Strides are in elements; a row is contiguous. What has no type is
// of elem's; A is the accumulator: float, or double for f64. Of a row of `width` elements the first
// `channels` count; the others are not read, and 0 in the results.
struct SwigluNormArgs {
  Element elem;
  const void* gate;    // (rows, width)
  const void* value;   // (rows, width)
  const void* grad;    // (rows, width), backward only
  const void* weight;  // (channels) of A
  const void* bias;    // (channels) of A, forward only
  void* out;           // (rows, width) contiguous, forward only
  void* dgate;         // (rows, width) contiguous, backward only
  void* dvalue;        // likewise
  void* mean;          // (rows) of A, written by the forward
  void* rstd;          // likewise
  int64_t width, channels, gate_stride, value_stride, grad_stride;
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
