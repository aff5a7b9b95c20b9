// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/attention_distill.h"

#include <algorithm>
#include <tuple>

#include "cpu/attention_boundary.h"
#include "cpu/attention_products.h"
#include "cpu/element_of.h"
#include "register.h"

namespace kdfast::cpu {
namespace {

constexpr const char* kOp = "attention_distill";

// What forward and backward both get.
struct Arguments {
  const Tensor &q, &k, &v, &teacher_q, &teacher_k;  // (B, H, N, D), teacher (B, Ht, N, Dt)
  AttentionOptions student;
  const Ints& teacher_heads;
  const OptionalTensor &teacher_cos, &teacher_sin;
  int64_t teacher_prefix;
  bool teacher_interleaved;
  double teacher_scale, temperature;
  const std::string& kind;
  int64_t products;
};

MapLoss map_loss(const std::string& kind) {
  if (kind == "kl") return MapLoss::kl;
  if (kind == "reverse_kl") return MapLoss::reverse_kl;
  if (kind == "jsd") return MapLoss::jsd;
  if (kind == "mse") return MapLoss::mse;
  if (kind == "cosine") return MapLoss::cosine;
  KDFAST_CHECK_VALUE(kind == "logit_mse", kOp, ": kind is unknown, got ", kind);
  return MapLoss::logit_mse;
}

// Products of bf16 are for two sides of one element type.
template <class A>
const DistillKernel<A>& kernel_of(Element student, Element teacher, Products fp32) {
  const Products products = student == teacher ? products_of(student, fp32) : Products::fp32;
  return attention_kernels<A>(products).distill[static_cast<int>(student)];
}

// One call, student and teacher.
template <class A>
struct Call : StudentCall<A> {
  Tensor teacher_q, teacher_k;
  std::vector<int64_t> teacher_heads;
  Tables<A> teacher_tables;
  A teacher_scale, inv_temperature;
  bool spoiled = false;  // whether a factor that is not finite makes NaN of the loss
  MapLoss kind;
  const DistillKernel<A>& kernel;

  explicit Call(const Arguments& a)
      : StudentCall<A>(kOp, a.q, a.k, a.v, a.student),
        teacher_q(of_teacher(a.teacher_q, a.teacher_q)),
        teacher_k(of_teacher(a.teacher_k, a.teacher_q)),
        teacher_heads(kept_heads(kOp, a.teacher_heads, teacher_q.size(1), false)),
        teacher_tables(kOp, a.teacher_cos, a.teacher_sin, a.teacher_prefix, a.teacher_interleaved,
                       table_rows(a.student.grid, a.student.window, a.q), teacher_q.size(3)),
        teacher_scale(static_cast<A>(a.teacher_scale)),
        // As COLD in kdfast/ops/attention_distill.py.
        inv_temperature(static_cast<A>(std::min(1 / a.temperature, sizeof(A) == 4 ? 1e30 : 1e300))),
        kind(map_loss(a.kind)),
        kernel(kernel_of<A>(element_of(kOp, a.q), element_of(kOp, teacher_q),
                            checked_products(kOp, a.products))) {
    KDFAST_CHECK_VALUE(teacher_q.size(0) == this->batch && teacher_q.size(2) == this->tokens, kOp,
                       ": the teacher must have q's B and N, got ", teacher_q.sizes(), " and ",
                       a.q.sizes());
    KDFAST_CHECK_VALUE(teacher_heads.size() == this->heads.size(), kOp,
                       ": one teacher head per kept head, got ", teacher_heads.size(), " and ",
                       this->heads.size());
    KDFAST_CHECK_VALUE(a.temperature > 0 && std::isfinite(a.temperature), kOp,
                       ": temperature must be above 0 and finite, got ", a.temperature);
    check_matrix(kOp, this->largest, teacher_q.size(3));
    if (std::isfinite(teacher_scale)) return;
    // The kernels would hide it in finite scores.
    spoiled = true;
    teacher_scale = 0;
  }

  // A teacher of fp64 counts as fp32 where the student is no more than that.
  static Tensor of_teacher(const Tensor& x, const Tensor& like) {
    const Tensor rows = checked(kOp, x, like);
    return sizeof(A) == 4 && rows.type() == Type::f64 ? rows.to(Type::f32) : rows;
  }

  int64_t rows() const { return this->batch * this->kept * this->tokens; }
  std::vector<int64_t> stats_shape() const {
    return {kMapStats[static_cast<int>(kind)], this->batch, this->kept, this->tokens};
  }

  DistillHead<A> head(int64_t item, A* stats) const {
    const int64_t b = this->image_of(item), j = this->kept_of(item);
    const int64_t h = this->heads[j], th = teacher_heads[j];
    return {{rows_of(this->q, b, h), rows_of(this->k, b, h), element_of(kOp, this->q), this->dim,
             this->scale, this->tables.view},
            {rows_of(teacher_q, b, th), rows_of(teacher_k, b, th), element_of(kOp, teacher_q),
             teacher_q.size(3), teacher_scale, teacher_tables.view},
            rows_of(this->v, b, h),
            this->span_of(item),
            this->pad_of(h),
            inv_temperature,
            kind,
            stats + (b * this->kept + j) * this->tokens,
            rows()};
  }

  // work(item, scratch) for every item; no result depends on the number of threads.
  template <class F>
  void for_each(const F& work) const {
    if (this->items() == 0) return;
    share_items(this->items(), kernel.scratch_bytes(this->largest, this->dim, teacher_q.size(3)),
                work);
  }
};

using Forward = std::tuple<Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class A>
Forward forward(const Arguments& arguments) {
  const Call<A> call(arguments);
  const Tensor out = empty_heads(call.q, call.kept, false);
  const Tensor stats = empty(call.stats_shape(), call.kDtype);
  if (!call.is_finite())
    return {call.not_a_number(out), call.not_a_number(empty({}, call.kDtype)),
            call.not_a_number(stats)};
  A* stats_data = stats.mutable_data_ptr<A>();
  std::vector<double> sums(call.items());
  call.for_each([&](int64_t item, char* scratch) {
    sums[item] =
        call.kernel.forward(call.head(item, stats_data),
                            rows_to(out, call.image_of(item), call.kept_of(item)), scratch);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  if (call.spoiled && call.rows() > 0) total = std::numeric_limits<double>::quiet_NaN();
  const double count = static_cast<double>(std::max<int64_t>(call.rows(), 1));
  return {out, scalar_result(total / count, call.kDtype), stats};
}

template <class A>
Backward backward(const Tensor& grad_out, const Tensor& grad_loss, const Tensor& out_,
                  const Tensor& stats_, const Arguments& arguments) {
  const Call<A> call(arguments);
  const Tensor out = checked(kOp, out_, out_), grad = checked(kOp, grad_out, out_);
  const Tensor stats = stats_.contiguous();
  const Ints want{call.batch, call.kept, call.tokens, call.dim};
  KDFAST_CHECK_VALUE(same(out.sizes(), want) && out.type() == call.q.type() &&
                         same(stats.sizes(), call.stats_shape()) && stats.type() == call.kDtype,
                     kOp, ": grad_out, out and stats must fit q, got ", out.sizes(), " and ",
                     stats.sizes());
  KDFAST_CHECK_VALUE(grad_loss.numel() == 1, kOp, ": grad_loss must be one number, got size ",
                     grad_loss.sizes());
  Tensor gradients[3];
  for (auto& x : gradients) x = empty_heads(call.q, call.q.size(1), call.kept < call.q.size(1));
  const auto& [dq, dk, dv] = gradients;
  const double upstream = call.spoiled ? 0 : *grad_loss.to(Type::f64).const_data_ptr<double>();
  const A weight =
      static_cast<A>(upstream / static_cast<double>(std::max<int64_t>(call.rows(), 1)));
  std::vector<A> pads(call.pad.defined() ? product_of(kOp, {call.items(), call.dim}) : int64_t{0});
  A* stats_data = stats.mutable_data_ptr<A>();
  call.for_each([&](int64_t item, char* scratch) {
    const int64_t b = call.image_of(item), j = call.kept_of(item), h = call.heads[j];
    const DistillGrad<A> grads{weight,
                               rows_of(grad, b, j),
                               rows_of(out, b, j),
                               rows_to(dq, b, h),
                               rows_to(dk, b, h),
                               rows_to(dv, b, h),
                               pads.empty() ? nullptr : pads.data() + item * call.dim};
    call.kernel.backward(call.head(item, stats_data), grads, scratch);
  });
  if (call.spoiled || !call.is_finite())
    for (const Tensor& x : {dq, dk}) call.spoil(x, 1);
  if (!call.is_finite()) call.spoil(dv, 1);
  if (!call.pad.defined()) return {dq, dk, dv, empty_as(call.q, {0})};
  return {dq, dk, dv, call.sum_pads(pads, 1, *arguments.student.pad_value)};
}

#define KDFAST_DISTILL_PARAMETERS                                                                 \
  const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &teacher_q,                     \
      const Tensor &teacher_k, const OptionalInts &heads, const Ints &teacher_heads,              \
      const OptionalTensor &cos, const OptionalTensor &sin, int64_t prefix, bool interleaved,     \
      double scale, const OptionalInts &grid, int64_t window, const OptionalTensor &pad,          \
      const OptionalTensor &teacher_cos, const OptionalTensor &teacher_sin,                       \
      int64_t teacher_prefix, bool teacher_interleaved, double teacher_scale, double temperature, \
      const std::string &kind, int64_t products
#define KDFAST_DISTILL_ARGUMENTS                                                                   \
  q, k, v, teacher_q, teacher_k, {heads, cos, sin, prefix, interleaved, scale, grid, window, pad}, \
      teacher_heads, teacher_cos, teacher_sin, teacher_prefix, teacher_interleaved, teacher_scale, \
      temperature, kind, products

Forward attention_distill(KDFAST_DISTILL_PARAMETERS) {
  const Arguments a{KDFAST_DISTILL_ARGUMENTS};
  return q.type() == Type::f64 ? forward<double>(a) : forward<float>(a);
}

Backward attention_distill_bwd(const Tensor& grad_out, const Tensor& grad_loss, const Tensor& out,
                               const Tensor& stats, KDFAST_DISTILL_PARAMETERS) {
  const Arguments a{KDFAST_DISTILL_ARGUMENTS};
  return q.type() == Type::f64 ? backward<double>(grad_out, grad_loss, out, stats, a)
                               : backward<float>(grad_out, grad_loss, out, stats, a);
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("attention_distill", TORCH_BOX(&kdfast::cpu::attention_distill));
  m.impl("attention_distill_bwd", TORCH_BOX(&kdfast::cpu::attention_distill_bwd));
}
