// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "elements.h"

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

void feature_loss_rows_generic(const FeatureLossArgs& args, int64_t begin, int64_t end);
void feature_loss_rows_avx2(const FeatureLossArgs& args, int64_t begin, int64_t end);
void feature_loss_rows_avx512(const FeatureLossArgs& args, int64_t begin, int64_t end);

// Sums of x - shift and of its square over rows [begin, end) of the teacher, for each feature.
// `sums` (2, features) of the accumulator's type is overwritten; shift (features), or null for 0.
void channel_sums_generic(const FeatureLossArgs& args, int64_t begin, int64_t end,
                          const void* shift, void* sums);
void channel_sums_avx2(const FeatureLossArgs& args, int64_t begin, int64_t end, const void* shift,
                       void* sums);
void channel_sums_avx512(const FeatureLossArgs& args, int64_t begin, int64_t end, const void* shift,
                         void* sums);

}  // namespace kdfast::cpu
