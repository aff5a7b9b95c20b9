// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/feature_loss.h"

#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/row_loss.h"
#include "register.h"

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
  KDFAST_CHECK_VALUE(kind == "cosine", "feature_loss: kind is unknown, got ", kind);
  return FeatureKind::cosine;
}

FeatureNorm parse_norm(std::string_view norm) {
  if (norm == "none") return FeatureNorm::none;
  if (norm == "layer") return FeatureNorm::layer;
  KDFAST_CHECK_VALUE(norm == "channel", "feature_loss: normalize is unknown, got ", norm);
  return FeatureNorm::channel;
}

// Fills mean and scale (features) of type A with the moments of the teacher's channels.
template <class A>
void channel_moments(const FeatureLossArgs& args, int64_t rows, const Tensor& mean,
                     const Tensor& scale) {
  const int64_t n = args.features, blocks = (rows + kBlock - 1) / kBlock;
  const auto fn = kernels().rows->channel_sums;
  // Sums around a value near the mean lose no digits in the variance.
  const int64_t few = std::min<int64_t>(rows, 32);
  const Tensor shift = empty({2, n}, type_of<A>);
  A* base = shift.mutable_data_ptr<A>();
  fn(args, 0, few, nullptr, base);
  for (int64_t c = 0; c < n; ++c) base[c] /= static_cast<A>(few);

  const Tensor sums = empty({blocks, 2, n}, type_of<A>);
  A* p = sums.mutable_data_ptr<A>();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kBlock * n));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      fn(args, b * kBlock, std::min(rows, (b + 1) * kBlock), base, p + b * 2 * n);
    }
  });
  std::vector<double> total(2 * n);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < 2 * n; ++i) total[i] += p[b * 2 * n + i];
  for (int64_t c = 0; c < n; ++c) {
    const double first = total[c] / rows, variance = total[n + c] / rows - first * first;
    mean.mutable_data_ptr<A>()[c] = static_cast<A>(base[c] + first);
    scale.mutable_data_ptr<A>()[c] = static_cast<A>(1 / std::sqrt(std::max(variance, 0.0) + kEps));
  }
}

// Sum of the losses of `rows` rows; writes their gradients.
double add_rows(const FeatureLossArgs& given, int64_t rows) {
  const Tensor losses = empty({rows}, Type::f64);
  FeatureLossArgs args = given;
  args.loss = losses.mutable_data_ptr<double>();
  const auto fn = kernels().rows->feature_loss;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / args.features);
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) { fn(args, begin, end); });
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
std::tuple<Tensor, Tensor> feature_loss(const Tensor& student, const Tensor& teacher,
                                        const std::string& kind, const std::string& normalize,
                                        bool need_grad) {
  KDFAST_CHECK_VALUE(student.dim() > 0 && student.size(-1) > 0 && same_sizes(student, teacher) &&
                         student.type() == teacher.type(),
                     "feature_loss: features must be alike, got ", student.sizes(), " and ",
                     teacher.sizes());
  FeatureLossArgs args{};
  args.elem = element_of("feature_loss", student);
  args.kind = parse_kind(kind);
  args.norm = parse_norm(normalize);
  const bool by_row = args.norm != FeatureNorm::none || args.kind == FeatureKind::cosine;
  const Tensor s = by_row ? as_rows(student) : student.contiguous();
  const Tensor t = by_row ? as_rows(teacher) : teacher.contiguous();
  const int64_t rows = s.numel() / s.size(-1);
  const double count = args.kind == FeatureKind::cosine ? rows : s.numel();
  const Tensor grad = empty_gradient(student, need_grad);
  const Type wide = accumulator(student);
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
    return {scalar_result(total / count, wide), grad};
  }

  args.student_stride = s.stride(0);
  args.teacher_stride = t.stride(0);
  const Tensor mean = empty({args.features}, wide), scale = empty({args.features}, wide);
  if (args.norm == FeatureNorm::channel && rows > 0) {
    const auto fill = args.elem == Element::f64 ? channel_moments<double> : channel_moments<float>;
    fill(args, rows, mean, scale);
    args.mean = mean.const_data_ptr();
    args.scale = scale.const_data_ptr();
  }
  return {scalar_result(add_rows(args, rows) / count, wide), grad};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("feature_loss", TORCH_BOX(&kdfast::cpu::feature_loss));
}
