// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/feature_loss.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <string_view>
#include <tuple>

#include "cpu/kernels.h"
#include "cpu/row_loss.h"

namespace kdfast::cpu {
namespace {

// As EPS and ZERO_NORM in kdfast/ops/feature_loss.py.
constexpr double kEps = 1e-6, kZeroNorm = 1e-8;
// Elements that count as a row where the loss knows no rows.
constexpr int64_t kChunk = 4096;
// Rows whose channel sums are fp32 before they go to fp64.
constexpr int64_t kBlock = 256;

FeatureKind parse_kind(std::string_view kind) {
  if (kind == "mse") return FeatureKind::mse;
  if (kind == "smooth_l1") return FeatureKind::smooth_l1;
  TORCH_CHECK_VALUE(kind == "cosine", "feature_loss: kind is unknown, got ", kind);
  return FeatureKind::cosine;
}

FeatureNorm parse_norm(std::string_view norm) {
  if (norm == "none") return FeatureNorm::none;
  if (norm == "layer") return FeatureNorm::layer;
  TORCH_CHECK_VALUE(norm == "channel", "feature_loss: normalize is unknown, got ", norm);
  return FeatureNorm::channel;
}

// Fills mean and scale (features) of type A with the moments of the teacher's channels.
template <class A>
void channel_moments(const FeatureLossArgs& args, int64_t rows, const at::Tensor& mean,
                     const at::Tensor& scale) {
  const int64_t n = args.features, blocks = (rows + kBlock - 1) / kBlock;
  const auto fn = kernels().rows->channel_sums;
  // Sums around a value near the mean lose no digits in the variance.
  const int64_t few = std::min<int64_t>(rows, 32);
  const at::Tensor shift = at::empty({2, n}, mean.options());
  A* base = shift.mutable_data_ptr<A>();
  fn(args, 0, few, nullptr, base);
  for (int64_t c = 0; c < n; ++c) base[c] /= static_cast<A>(few);

  const at::Tensor sums = at::empty({blocks, 2, n}, mean.options());
  A* p = sums.mutable_data_ptr<A>();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kBlock * n));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      fn(args, b * kBlock, std::min(rows, (b + 1) * kBlock), base, p + b * 2 * n);
    }
  });
  const at::Tensor totals = sums.to(at::kDouble).sum(0);
  const double* total = totals.const_data_ptr<double>();
  for (int64_t c = 0; c < n; ++c) {
    const double first = total[c] / rows, variance = total[n + c] / rows - first * first;
    mean.mutable_data_ptr<A>()[c] = static_cast<A>(base[c] + first);
    scale.mutable_data_ptr<A>()[c] = static_cast<A>(1 / std::sqrt(std::max(variance, 0.0) + kEps));
  }
}

// Sum of the losses of `rows` rows; writes their gradients.
double add_rows(const FeatureLossArgs& given, int64_t rows) {
  const at::Tensor losses = at::empty({rows}, at::kDouble);
  FeatureLossArgs args = given;
  args.loss = losses.mutable_data_ptr<double>();
  const auto fn = kernels().rows->feature_loss;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / args.features);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { fn(args, begin, end); });
  return sum_rows(losses);
}

// Without normalisation mse and smooth_l1 know no rows: contiguous elements, in long rows.
double add_elements(FeatureLossArgs args, int64_t count, size_t size, size_t grad_size) {
  args.features = args.student_stride = args.teacher_stride = kChunk;
  const int64_t chunks = count / kChunk, rest = count % kChunk;
  double total = add_rows(args, chunks);
  if (rest == 0) return total;
  const auto skip = [&](const void* p, size_t bytes) {
    return static_cast<const char*>(p) + chunks * kChunk * bytes;
  };
  args.student = skip(args.student, size);
  args.teacher = skip(args.teacher, size);
  if (args.grad) args.grad = const_cast<char*>(skip(args.grad, grad_size));
  args.features = rest;
  return total + add_rows(args, 1);
}

// student, teacher (..., C) -> loss (), gradient of student's shape or (0,).
std::tuple<at::Tensor, at::Tensor> feature_loss(const at::Tensor& student,
                                                const at::Tensor& teacher, std::string_view kind,
                                                std::string_view normalize, bool need_grad) {
  TORCH_CHECK_VALUE(student.dim() > 0 && student.size(-1) > 0 && student.is_same_size(teacher) &&
                        student.scalar_type() == teacher.scalar_type(),
                    "feature_loss: features must be alike, got ", student.sizes(), " and ",
                    teacher.sizes());
  FeatureLossArgs args{};
  args.elem = element_of("feature_loss", student);
  args.kind = parse_kind(kind);
  args.norm = parse_norm(normalize);
  const bool by_row = args.norm != FeatureNorm::none || args.kind == FeatureKind::cosine;
  const at::Tensor s = by_row ? as_rows(student) : student.contiguous();
  const at::Tensor t = by_row ? as_rows(teacher) : teacher.contiguous();
  const int64_t rows = s.numel() / s.size(-1);
  const double count = args.kind == FeatureKind::cosine ? rows : s.numel();
  const at::Tensor grad = empty_gradient(student, need_grad);
  const auto options = student.options().dtype(accumulator(student));
  args.student = s.const_data_ptr();
  args.teacher = t.const_data_ptr();
  args.features = s.size(-1);
  args.eps = kEps;
  args.zero_norm = kZeroNorm;
  args.weight = 1 / count;
  if (need_grad) args.grad = grad.mutable_data_ptr();
  args.streamed = grad.nbytes() >= kStreamBytes;
  if (!by_row) {
    const double total = add_elements(args, s.numel(), s.element_size(), grad.element_size());
    return {scalar_result(total / count, options), grad};
  }

  args.student_stride = s.stride(0);
  args.teacher_stride = t.stride(0);
  const at::Tensor mean = at::empty({args.features}, options), scale = at::empty_like(mean);
  if (args.norm == FeatureNorm::channel && rows > 0) {
    const auto fill = args.elem == Element::f64 ? channel_moments<double> : channel_moments<float>;
    fill(args, rows, mean, scale);
    args.mean = mean.const_data_ptr();
    args.scale = scale.const_data_ptr();
  }
  return {scalar_result(add_rows(args, rows) / count, options), grad};
}

}  // namespace
}  // namespace kdfast::cpu

TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("feature_loss", &kdfast::cpu::feature_loss); }
