// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "cpu/isa/elements.h"

namespace kdfast::cpu {

enum class FeatureKind { mse, smooth_l1, cosine };
enum class FeatureNorm { none, layer, channel };

// Everything but the rows to do. Strides are in elements; a row's features are contiguous.
struct FeatureLossArgs {
  Element elem;
  FeatureKind kind;
  FeatureNorm norm;
  const void* student;  // (rows, features)
  const void* teacher;  // (rows, features)
  const void* mean;     // (features) of the accumulator's type, for FeatureNorm::channel
  const void* scale;    // (features) 1 / standard deviation, likewise
  void* grad;           // (rows, features) contiguous in elem, float for f16; or null
  double* loss;         // (rows) out: sum over the row's elements, 1 - cos for cosine
  int64_t features, student_stride, teacher_stride;
  double eps, zero_norm;
  double weight;  // what a row's loss counts in the result, for the gradient
  bool streamed;  // whether the gradient is too large to be kept in cache
};

}  // namespace kdfast::cpu
