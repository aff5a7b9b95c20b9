// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "cpu/isa/elements.h"

namespace kdfast::cpu {

// Everything but the rows to do. Strides are in elements; classes are contiguous.
struct KdLossArgs {
  Element elem;
  const void* student;    // (rows, classes)
  const void* teacher;    // (rows, classes)
  const int64_t* labels;  // (rows), or null
  const void* soft;       // (rows, classes) contiguous, double for f64, else float; or null
  void* grad;             // (rows, classes) contiguous in elem, float for f16; or null
  double* kd;             // (rows) out
  double* ce;             // (rows) out
  int64_t classes, student_stride, teacher_stride;
  int64_t ignore_index;
  double temperature, smoothing;
  bool streamed;                // whether the gradient is too large to be kept in cache
  double kd_weight, ce_weight;  // what a row's kd and ce count in the loss, for the gradient
};

// Numbers of the accumulator type that a thread needs as scratch, for rows of `classes`.
constexpr int64_t kd_loss_scratch(int64_t classes) { return 3 * (classes + 16); }

}  // namespace kdfast::cpu
