// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/kd_loss.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "cpu/row_loss.h"

namespace kdfast::cpu {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Number of rows that are not ignored; an index out of range would read and write elsewhere.
int64_t count_labels(const at::Tensor& labels, int64_t classes, int64_t ignore_index) {
  const int64_t* p = labels.const_data_ptr<int64_t>();
  int64_t count = 0;
  for (int64_t r = 0; r < labels.numel(); ++r) {
    if (p[r] == ignore_index) continue;
    TORCH_CHECK_INDEX(p[r] >= 0 && p[r] < classes, "kd_loss: target must be in [0, ", classes,
                      ") or ignore_index, got ", p[r]);
    ++count;
  }
  return count;
}

void check_options(double temperature, std::string_view reduction) {
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature),
                    "kd_loss: temperature must be above 0 and finite, got ", temperature);
  TORCH_CHECK_VALUE(reduction == "batchmean" || reduction == "sum" || reduction == "none",
                    "kd_loss: reduction is unknown, got ", reduction);
}

void check_shapes(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& target) {
  TORCH_CHECK_VALUE(student.dim() > 0 && student.size(-1) > 0 && student.is_same_size(teacher) &&
                        student.scalar_type() == teacher.scalar_type(),
                    "kd_loss: logits must be alike, got ", student.sizes(), " and ",
                    teacher.sizes());
  if (!target.defined()) return;
  const bool hard = target.scalar_type() == at::kLong;
  TORCH_CHECK_VALUE(hard || target.scalar_type() == accumulator(student),
                    "kd_loss: target must be int64 or the accumulator's type, got ",
                    target.scalar_type());
  TORCH_CHECK_VALUE(
      target.sizes() == (hard ? student.sizes().slice(0, student.dim() - 1) : student.sizes()),
      "kd_loss: target does not fit the logits, got ", target.sizes());
}

// What does not count is left out, whatever it is: an infinite kd, the mean ce of no rows.
template <class T>
T mixed(double alpha, const T& kd, const T& ce) {
  if (alpha == 1) return T(kd * 1.0);
  return alpha == 0 ? T(ce * 1.0) : T(kd * alpha + ce * (1 - alpha));
}

Results reduce(const std::string& reduction, const at::Tensor& student, const at::Tensor& kd,
               const at::Tensor& ce, double kd_count, double ce_count, double alpha,
               const at::Tensor& grad) {
  const auto options = student.options().dtype(accumulator(student));
  if (reduction == "none") {
    const auto shape = student.sizes().slice(0, student.dim() - 1);
    const auto rows = [&](const at::Tensor& x) { return x.view(shape).to(options.dtype()); };
    return {rows(mixed(alpha, kd, ce)), rows(kd), rows(ce), grad};
  }
  const double kd_value = sum_rows(kd) / kd_count, ce_value = sum_rows(ce) / ce_count;
  const auto scalar = [&](double x) { return scalar_result(x, options); };
  return {scalar(mixed(alpha, kd_value, ce_value)), scalar(kd_value), scalar(ce_value), grad};
}

// student, teacher (..., C); target undefined, (...) int64 or (..., C) in the accumulator's type.
// grad: contiguous like student, which it may be, or without elements.
Results run(const at::Tensor& student, const at::Tensor& teacher,
            const std::optional<at::Tensor>& target, double temperature, double alpha,
            std::string_view reduction, double label_smoothing, int64_t ignore_index,
            const at::Tensor& grad) {
  const at::Tensor goal = target ? target->contiguous() : at::Tensor();
  check_shapes(student, teacher, goal);
  check_options(temperature, reduction);
  const at::Tensor s = as_rows(student), t = as_rows(teacher);
  const bool hard = goal.defined() && goal.scalar_type() == at::kLong;
  const int64_t rows = s.size(0), classes = s.size(1);
  const bool mean = reduction == "batchmean";
  const double kd_count = mean ? rows : 1;
  const int64_t labels = hard ? count_labels(goal, classes, ignore_index) : rows;
  const double ce_count = !mean ? 1 : goal.defined() ? labels : std::max<int64_t>(rows, 1);

  const at::Tensor kd = at::empty({rows}, at::kDouble), ce = at::empty({rows}, at::kDouble);
  KdLossArgs args{};
  args.elem = element_of("kd_loss", student);
  args.student = s.const_data_ptr();
  args.teacher = t.const_data_ptr();
  if (hard) args.labels = goal.const_data_ptr<int64_t>();
  if (goal.defined() && !hard) args.soft = goal.const_data_ptr();
  if (grad.numel() > 0) args.grad = grad.mutable_data_ptr();
  args.kd = kd.mutable_data_ptr<double>();
  args.ce = ce.mutable_data_ptr<double>();
  args.classes = classes;
  args.student_stride = s.stride(0);
  args.teacher_stride = t.stride(0);
  args.ignore_index = ignore_index;
  args.temperature = temperature;
  args.smoothing = label_smoothing;
  // Over logits that are in cache by then, other stores are faster.
  args.streamed = grad.nbytes() >= kStreamBytes && !grad.is_same(student);
  args.kd_weight = alpha / kd_count;
  args.ce_weight = alpha == 1 ? 0 : (1 - alpha) / ce_count;  // the count may be 0

  const auto fn = kernels().rows->kd_loss;
  for_rows(rows, classes, kd_loss_scratch(classes), accumulator(student),
           [&](int64_t begin, int64_t end, void* scratch) { fn(args, begin, end, scratch); });
  return reduce(std::string(reduction), student, kd, ce, kd_count, ce_count, alpha, grad);
}

Results kd_loss(const at::Tensor& student, const at::Tensor& teacher,
                const std::optional<at::Tensor>& target, double temperature, double alpha,
                std::string_view reduction, double label_smoothing, int64_t ignore_index,
                bool need_grad) {
  return run(student, teacher, target, temperature, alpha, reduction, label_smoothing, ignore_index,
             empty_gradient(student, need_grad));
}

// Writes the gradient over the student's logits.
std::tuple<at::Tensor, at::Tensor, at::Tensor> kd_loss_(
    at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& target,
    double temperature, double alpha, std::string_view reduction, double label_smoothing,
    int64_t ignore_index) {
  TORCH_CHECK_VALUE(student.is_contiguous() && student.scalar_type() != at::kHalf,
                    "kd_loss: logits to be overwritten must be contiguous and not fp16, got ",
                    student.scalar_type(), " with strides ", student.strides());
  at::assert_no_overlap(student, teacher);
  if (target) at::assert_no_overlap(student, *target);
  const auto [loss, kd, ce, _] = run(student, teacher, target, temperature, alpha, reduction,
                                     label_smoothing, ignore_index, student);
  return {loss, kd, ce};
}

}  // namespace
}  // namespace kdfast::cpu

TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("kd_loss", &kdfast::cpu::kd_loss);
  m.impl("kd_loss_", &kdfast::cpu::kd_loss_);
}
