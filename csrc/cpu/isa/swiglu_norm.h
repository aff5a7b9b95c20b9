// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "cpu/isa/elements.h"

namespace kdfast::cpu {

// Everything but the rows to do. Strides are in elements; a row is contiguous. Pointers without a
// type named are to elements of `elem`; A is the accumulator: float, or double for f64. The first
// `channels` of the `width` elements of a row count; the others are not read, and 0 in the results.
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

}  // namespace kdfast::cpu
