// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/kd_loss.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/row_loss.h"
#include "register.h"

namespace kdfast::cpu {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Number of rows that are not ignored; an index out of range would read and write elsewhere.
int64_t count_labels(const Tensor& labels, int64_t classes, int64_t ignore_index) {
  const int64_t* p = labels.const_data_ptr<int64_t>();
  int64_t count = 0;
  for (int64_t r = 0; r < labels.numel(); ++r) {
    if (p[r] == ignore_index) continue;
    KDFAST_CHECK_INDEX(p[r] >= 0 && p[r] < classes, "kd_loss: target must be in [0, ", classes,
                       ") or ignore_index, got ", p[r]);
    ++count;
  }
  return count;
}

void check_options(double temperature, std::string_view reduction) {
  KDFAST_CHECK_VALUE(temperature > 0 && std::isfinite(temperature),
                     "kd_loss: temperature must be above 0 and finite, got ", temperature);
  KDFAST_CHECK_VALUE(reduction == "batchmean" || reduction == "sum" || reduction == "none",
                     "kd_loss: reduction is unknown, got ", reduction);
}

void check_shapes(const Tensor& student, const Tensor& teacher, const Tensor& target) {
  KDFAST_CHECK_VALUE(student.dim() > 0 && student.size(-1) > 0 && same_sizes(student, teacher) &&
                         student.type() == teacher.type(),
                     "kd_loss: logits must be alike, got ", student.sizes(), " and ",
                     teacher.sizes());
  if (!target.defined()) return;
  const bool hard = target.type() == Type::i64;
  KDFAST_CHECK_VALUE(hard || target.type() == accumulator(student),
                     "kd_loss: target must be int64 or the accumulator's type, got ",
                     target.type_name());
  KDFAST_CHECK_VALUE(same(target.sizes(), student.sizes().first(student.dim() - (hard ? 1 : 0))),
                     "kd_loss: target does not fit the logits, got ", target.sizes());
}

// What does not count is left out, whatever it is: an infinite kd, the mean ce of no rows.
double mixed(double alpha, double kd, double ce) {
  if (alpha == 1) return kd;
  return alpha == 0 ? ce : kd * alpha + ce * (1 - alpha);
}

// x (rows) in the accumulator's type, in the shape of the logits without classes.
template <class A>
Tensor rows_as(const double* x, Sizes shape) {
  const Tensor out = empty(shape, type_of<A>);
  std::copy_n(x, out.numel(), out.mutable_data_ptr<A>());
  return out;
}

Results reduce(const std::string& reduction, const Tensor& student, const Tensor& kd,
               const Tensor& ce, double kd_count, double ce_count, double alpha,
               const Tensor& grad) {
  const Type wide = accumulator(student);
  if (reduction == "none") {
    const double *kds = kd.const_data_ptr<double>(), *ces = ce.const_data_ptr<double>();
    std::vector<double> both(kd.numel());
    for (size_t r = 0; r < both.size(); ++r) both[r] = mixed(alpha, kds[r], ces[r]);
    const Sizes shape = student.sizes().first(student.dim() - 1);
    const auto as = wide == Type::f64 ? rows_as<double> : rows_as<float>;
    return {as(both.data(), shape), as(kds, shape), as(ces, shape), grad};
  }
  const double kd_value = sum_rows(kd) / kd_count, ce_value = sum_rows(ce) / ce_count;
  const auto scalar = [&](double x) { return scalar_result(x, wide); };
  return {scalar(mixed(alpha, kd_value, ce_value)), scalar(kd_value), scalar(ce_value), grad};
}

// student, teacher (..., C); target undefined, (...) int64 or (..., C) in the accumulator's type.
// grad: contiguous like student, which it may be, or without elements.
Results run(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
            double temperature, double alpha, const std::string& reduction, double label_smoothing,
            int64_t ignore_index, const Tensor& grad) {
  const Tensor goal = target ? target->contiguous() : Tensor();
  check_shapes(student, teacher, goal);
  check_options(temperature, reduction);
  const Tensor s = as_rows(student), t = as_rows(teacher);
  const bool hard = goal.defined() && goal.type() == Type::i64;
  const int64_t rows = s.size(0), classes = s.size(1);
  const bool mean = reduction == "batchmean";
  const double kd_count = mean ? rows : 1;
  const int64_t labels = hard ? count_labels(goal, classes, ignore_index) : rows;
  const double ce_count = !mean ? 1 : goal.defined() ? labels : std::max<int64_t>(rows, 1);

  const Tensor kd = empty({rows}, Type::f64), ce = empty({rows}, Type::f64);
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
  args.streamed =
      grad.nbytes() >= kStreamBytes && grad.const_data_ptr() != student.const_data_ptr();
  args.kd_weight = alpha / kd_count;
  args.ce_weight = alpha == 1 ? 0 : (1 - alpha) / ce_count;  // the count may be 0

  const auto fn = kernels().rows->kd_loss;
  for_rows(rows, classes, kd_loss_scratch(classes), accumulator(student),
           [&](int64_t begin, int64_t end, void* scratch) { fn(args, begin, end, scratch); });
  return reduce(reduction, student, kd, ce, kd_count, ce_count, alpha, grad);
}

Results kd_loss(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                double temperature, double alpha, const std::string& reduction,
                double label_smoothing, int64_t ignore_index, bool need_grad) {
  return run(student, teacher, target, temperature, alpha, reduction, label_smoothing, ignore_index,
             empty_gradient(student, need_grad));
}

// As torch's in-place operators: an argument whose elements lie apart is not looked at.
void check_apart(const Tensor& written, const Tensor& read) {
  const auto* from = static_cast<const char*>(written.const_data_ptr());
  const auto* begin = static_cast<const char*>(read.const_data_ptr());
  const bool apart = begin + read.nbytes() <= from || from + written.nbytes() <= begin;
  if (!apart && read.is_dense())
    throw std::runtime_error(
        "kd_loss: the logits to be overwritten and another argument must not refer to a single "
        "memory location; clone() it");
}

// Writes the gradient over the student's logits.
std::tuple<Tensor, Tensor, Tensor> kd_loss_(const Tensor& student, const Tensor& teacher,
                                            const OptionalTensor& target, double temperature,
                                            double alpha, const std::string& reduction,
                                            double label_smoothing, int64_t ignore_index) {
  KDFAST_CHECK_VALUE(student.is_contiguous() && student.type() != Type::f16,
                     "kd_loss: logits to be overwritten must be contiguous and not fp16, got ",
                     student.type_name(), " with strides ", student.strides());
  check_apart(student, teacher);
  if (target) check_apart(student, *target);
  const auto [loss, kd, ce, _] = run(student, teacher, target, temperature, alpha, reduction,
                                     label_smoothing, ignore_index, student);
  return {loss, kd, ce};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("kd_loss", TORCH_BOX(&kdfast::cpu::kd_loss));
  m.impl("kd_loss_", TORCH_BOX(&kdfast::cpu::kd_loss_));
}
