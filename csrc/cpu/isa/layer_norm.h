// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "cpu/isa/elements.h"

namespace kdfast::cpu {

// Everything but the rows to do. The stride is in elements; a row is contiguous. Weight and bias
// are of `elem`, or of the accumulator (float, or double for f64) if `wide`; null for 1 and 0.
struct LayerNormArgs {
  Element elem;
  bool wide;
  const void* x;       // (rows, channels)
  const void* weight;  // (channels)
  const void* bias;    // (channels)
  void* out;           // (rows, channels) contiguous
  int64_t channels, stride;
  double eps;
};

}  // namespace kdfast::cpu
