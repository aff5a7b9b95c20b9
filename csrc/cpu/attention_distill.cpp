// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/attention_distill.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/attention_boundary.h"
#include "cpu/attention_products.h"
#include "cpu/element_of.h"
#include "dispatch.h"

namespace kdfast::cpu {
namespace {

constexpr const char* kOp = "attention_distill";
using OptionalTensor = std::optional<at::Tensor>;

// What forward and backward both get, in the schema's order.
struct Arguments {
  const at::Tensor &q, &k, &v, &teacher_q, &teacher_k;  // (B, H, N, D), teacher (B, Ht, N, Dt)
  at::OptionalIntArrayRef heads;
  at::IntArrayRef teacher_heads;
  const OptionalTensor &cos, &sin;
  int64_t prefix;
  bool interleaved;
  double scale;
  at::OptionalIntArrayRef grid;
  int64_t window;
  const OptionalTensor& pad_value;  // (H, D)
  const OptionalTensor &teacher_cos, &teacher_sin;
  int64_t teacher_prefix;
  bool teacher_interleaved;
  double teacher_scale, temperature;
  c10::string_view kind;
};

MapLoss map_loss(c10::string_view kind) {
  if (kind == "kl") return MapLoss::kl;
  if (kind == "reverse_kl") return MapLoss::reverse_kl;
  if (kind == "jsd") return MapLoss::jsd;
  if (kind == "mse") return MapLoss::mse;
  if (kind == "cosine") return MapLoss::cosine;
  TORCH_CHECK_VALUE(kind == "logit_mse", kOp, ": kind is unknown, got ", kind);
  return MapLoss::logit_mse;
}

template <class A>
DistillKernel<A> choose_kernel(Element student, [[maybe_unused]] Element teacher) {
  if constexpr (sizeof(A) == 8) {
    return distill_generic_f64();
  } else {
#if KDFAST_X86
    switch (student == teacher ? products_of(student) : Products::fp32) {
      case Products::bf16:
        if (isa() == Isa::amx) return distill_amx(student);
        if (isa() == Isa::amx_emulated) return distill_amx_emulated(student);
        if (isa() == Isa::avx512_bf16) return distill_avx512_bf16(student);
        break;
      case Products::split:  // three products instead of one: faster than fp32 in tiles only
        if (isa() == Isa::amx) return distill_amx_split(student);
        if (isa() == Isa::amx_emulated) return distill_amx_split_emulated(student);
        break;
      case Products::fp32: break;
    }
    if (isa() >= Isa::avx512) return distill_avx512(student);
    if (isa() >= Isa::avx2) return distill_avx2(student);
#endif
    return distill_generic(student);
  }
}

char* data_of(const at::Tensor& x, int64_t b, int64_t h) {
  return static_cast<char*>(x.data_ptr()) + (b * x.stride(0) + h * x.stride(1)) * x.element_size();
}
Rows rows_of(const at::Tensor& x, int64_t b, int64_t h) { return {data_of(x, b, h), x.stride(2)}; }
MutableRows rows_to(const at::Tensor& x, int64_t b, int64_t h) {
  return {data_of(x, b, h), x.stride(2)};
}

at::Tensor checked(const at::Tensor& x, const at::Tensor& like) {
  TORCH_CHECK_VALUE(
      like.dim() == 4 && x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type(), kOp,
      ": tensors must be (B, H, N, D) of one shape and dtype, got ", x.sizes(), " and ",
      like.sizes());
  return with_contiguous_rows(x);
}

// One call, with everything resolved that an item (image, kept head, window) needs.
template <class A>
struct Call {
  at::Tensor q, k, v, teacher_q, teacher_k, pad;
  std::vector<int64_t> heads, teacher_heads;
  TokenGrid grid;
  Tables<A> tables, teacher_tables;
  A scale, teacher_scale, inv_temperature;
  MapLoss kind;
  int64_t batch, kept, tokens, dim, windows;
  DistillKernel<A> kernel;

  explicit Call(const Arguments& a)
      : q(checked(a.q, a.q)),
        k(checked(a.k, a.q)),
        v(checked(a.v, a.q)),
        teacher_q(of_teacher(a.teacher_q, a.teacher_q)),
        teacher_k(of_teacher(a.teacher_k, a.teacher_q)),
        heads(kept_heads(kOp, a.heads, q.size(1))),
        teacher_heads(kept_heads(kOp, a.teacher_heads, teacher_q.size(1))),
        grid(token_grid(kOp, a.grid, a.window, q.size(2))),
        tables(kOp, a.cos, a.sin, a.prefix, a.interleaved, table_rows(a), q.size(3)),
        teacher_tables(kOp, a.teacher_cos, a.teacher_sin, a.teacher_prefix, a.teacher_interleaved,
                       table_rows(a), teacher_q.size(3)),
        scale(static_cast<A>(a.scale)),
        teacher_scale(static_cast<A>(a.teacher_scale)),
        inv_temperature(static_cast<A>(1 / a.temperature)),
        kind(map_loss(a.kind)),
        batch(q.size(0)),
        kept(static_cast<int64_t>(heads.size())),
        tokens(q.size(2)),
        dim(q.size(3)),
        windows(tokens == 0 ? 0 : window_count(grid)),
        kernel(choose_kernel<A>(element_of(kOp, q), element_of(kOp, teacher_q))) {
    TORCH_CHECK_VALUE(teacher_q.size(0) == batch && teacher_q.size(2) == tokens, kOp,
                      ": the teacher must have q's B and N, got ", teacher_q.sizes(), " and ",
                      q.sizes());
    TORCH_CHECK_VALUE(teacher_heads.size() == heads.size(), kOp,
                      ": one teacher head per kept head, got ", teacher_heads.size(), " and ",
                      heads.size());
    if (!a.pad_value.has_value()) return;
    pad = a.pad_value->to(dtype()).contiguous();
    TORCH_CHECK_VALUE(pad.dim() == 2 && pad.size(0) == q.size(1) && pad.size(1) == dim, kOp,
                      ": pad_value must be (", q.size(1), ", ", dim, "), got ", pad.sizes());
  }

  // A teacher of fp64 counts as fp32 where the student is no more than that.
  static at::Tensor of_teacher(const at::Tensor& x, const at::Tensor& like) {
    const at::Tensor rows = checked(x, like);
    return sizeof(A) == 4 && rows.scalar_type() == at::kDouble ? rows.to(at::kFloat) : rows;
  }
  static int64_t table_rows(const Arguments& a) {
    return a.grid.has_value() ? a.window * a.window : a.q.size(2);
  }
  static at::ScalarType dtype() { return c10::CppTypeToScalarType<A>::value; }

  int64_t rows() const { return batch * kept * tokens; }
  int64_t items() const { return batch * kept * windows; }
  std::vector<int64_t> stats_shape() const {
    return {kMapStats[static_cast<int>(kind)], batch, kept, tokens};
  }

  // Windows are the slowest index: the largest come first.
  int64_t image_of(int64_t item) const { return item / kept % batch; }
  int64_t kept_of(int64_t item) const { return item % kept; }

  DistillHead<A> head(int64_t item, A* stats) const {
    const int64_t b = image_of(item), j = kept_of(item), h = heads[j], th = teacher_heads[j];
    return {{rows_of(q, b, h), rows_of(k, b, h), element_of(kOp, q), dim, scale, tables.view},
            {rows_of(teacher_q, b, th), rows_of(teacher_k, b, th), element_of(kOp, teacher_q),
             teacher_q.size(3), teacher_scale, teacher_tables.view},
            rows_of(v, b, h),
            window_span(grid, item / (batch * kept), pad.defined()),
            pad.defined() ? pad.const_data_ptr<A>() + h * dim : nullptr,
            inv_temperature,
            kind,
            stats + (b * kept + j) * tokens,
            rows()};
  }

  // work(item, scratch) for every item; no result depends on the number of threads.
  template <class F>
  void for_each(const F& work) const {
    const int64_t largest = largest_window(grid);
    share_items(items(), kernel.scratch_bytes(largest, dim, teacher_q.size(3)), work);
  }
};

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class A>
Forward forward(const Arguments& arguments) {
  const Call<A> call(arguments);
  const auto options = call.q.options().dtype(call.dtype());
  const at::Tensor out = empty_heads(call.q, call.kept, false);
  const at::Tensor stats = at::empty(call.stats_shape(), options);
  A* stats_data = stats.mutable_data_ptr<A>();
  std::vector<double> sums(call.items());
  call.for_each([&](int64_t item, char* scratch) {
    sums[item] =
        call.kernel.forward(call.head(item, stats_data),
                            rows_to(out, call.image_of(item), call.kept_of(item)), scratch);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  const double count = static_cast<double>(std::max<int64_t>(call.rows(), 1));
  return {out, at::full({}, total / count, options), stats};
}

// Sum over images and windows in a fixed order; heads that are not kept get zero.
template <class A>
at::Tensor sum_pads(const Call<A>& call, const std::vector<A>& parts, at::ScalarType dtype) {
  at::Tensor total = at::zeros(call.pad.sizes(), call.pad.options());
  A* to = total.mutable_data_ptr<A>();
  for (int64_t item = 0; item < call.items(); ++item)
    for (int64_t c = 0; c < call.dim; ++c)
      to[call.heads[call.kept_of(item)] * call.dim + c] += parts[item * call.dim + c];
  return total.to(dtype);
}

template <class A>
Backward backward(const at::Tensor& grad_out, const at::Tensor& grad_loss, const at::Tensor& out_,
                  const at::Tensor& stats_, const Arguments& arguments) {
  const Call<A> call(arguments);
  const at::Tensor out = checked(out_, out_), grad = checked(grad_out, out_);
  const at::Tensor stats = stats_.contiguous();
  const std::vector<int64_t> want{call.batch, call.kept, call.tokens, call.dim};
  TORCH_CHECK_VALUE(out.sizes() == want && out.scalar_type() == call.q.scalar_type() &&
                        stats.sizes() == call.stats_shape() && stats.scalar_type() == call.dtype(),
                    kOp, ": grad_out, out and stats must fit q, got ", out.sizes(), " and ",
                    stats.sizes());
  at::Tensor gradients[3];
  for (auto& x : gradients) x = empty_heads(call.q, call.q.size(1), call.kept < call.q.size(1));
  const auto& [dq, dk, dv] = gradients;
  const A weight = static_cast<A>(grad_loss.item<double>() /
                                  static_cast<double>(std::max<int64_t>(call.rows(), 1)));
  std::vector<A> pads(call.pad.defined() ? call.items() * call.dim : 0);
  A* stats_data = stats.data_ptr<A>();
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
  if (!call.pad.defined()) return {dq, dk, dv, at::empty({0}, call.q.options())};
  return {dq, dk, dv, sum_pads(call, pads, arguments.pad_value->scalar_type())};
}

#define KDFAST_DISTILL_PARAMETERS                                                                 \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &teacher_q,     \
      const at::Tensor &teacher_k, at::OptionalIntArrayRef heads, at::IntArrayRef teacher_heads,  \
      const OptionalTensor &cos, const OptionalTensor &sin, int64_t prefix, bool interleaved,     \
      double scale, at::OptionalIntArrayRef grid, int64_t window, const OptionalTensor &pad,      \
      const OptionalTensor &teacher_cos, const OptionalTensor &teacher_sin,                       \
      int64_t teacher_prefix, bool teacher_interleaved, double teacher_scale, double temperature, \
      c10::string_view kind
#define KDFAST_DISTILL_ARGUMENTS                                                                   \
  q, k, v, teacher_q, teacher_k, heads, teacher_heads, cos, sin, prefix, interleaved, scale, grid, \
      window, pad, teacher_cos, teacher_sin, teacher_prefix, teacher_interleaved, teacher_scale,   \
      temperature, kind

Forward attention_distill(KDFAST_DISTILL_PARAMETERS) {
  const Arguments a{KDFAST_DISTILL_ARGUMENTS};
  return q.scalar_type() == at::kDouble ? forward<double>(a) : forward<float>(a);
}

Backward attention_distill_bwd(const at::Tensor& grad_out, const at::Tensor& grad_loss,
                               const at::Tensor& out, const at::Tensor& stats,
                               KDFAST_DISTILL_PARAMETERS) {
  const Arguments a{KDFAST_DISTILL_ARGUMENTS};
  return q.scalar_type() == at::kDouble ? backward<double>(grad_out, grad_loss, out, stats, a)
                                        : backward<float>(grad_out, grad_loss, out, stats, a);
}

}  // namespace
}  // namespace kdfast::cpu

TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("attention_distill", &kdfast::cpu::attention_distill);
  m.impl("attention_distill_bwd", &kdfast::cpu::attention_distill_bwd);
}
