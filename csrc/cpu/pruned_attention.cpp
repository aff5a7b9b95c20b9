// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/pruned_attention.h"

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/attention_bias.h"
#include "cpu/attention_boundary.h"
#include "cpu/attention_products.h"
#include "cpu/element_of.h"
#include "dispatch.h"

namespace kdfast::cpu {
namespace {

constexpr const char* kOp = "pruned_attention";
// Below this many queries a part of a head costs more in packing keys than it spreads.
constexpr int64_t kMinQueries = 96;

template <class A>
AttentionKernel<A> choose_kernel(Element element);
template <>
AttentionKernel<double> choose_kernel<double>(Element) {
  return attention_generic_f64();
}
template <>
AttentionKernel<float> choose_kernel<float>(Element element) {
#if defined(KDFAST_X86)
  switch (products_of(element)) {
    case Products::bf16:
      if (isa() == Isa::amx) return attention_amx(element);
      if (isa() == Isa::amx_emulated) return attention_amx_emulated(element);
      if (isa() == Isa::avx512_bf16) return attention_avx512_bf16(element);
      break;
    case Products::split:  // three products instead of one: faster than fp32 in tiles only
      if (isa() == Isa::amx) return attention_amx_split(element);
      if (isa() == Isa::amx_emulated) return attention_amx_split_emulated(element);
      break;
    case Products::fp32: break;
  }
  if (isa() >= Isa::avx512) return attention_avx512(element);
  if (isa() == Isa::avx2) return attention_avx2(element);
#endif
  return attention_generic(element);
}

// The op's arguments after q, k, v.
struct Options {
  at::OptionalIntArrayRef heads;
  const std::optional<at::Tensor>&cos, &sin;
  int64_t prefix;
  bool interleaved;
  double scale;
  at::OptionalIntArrayRef grid;
  int64_t window;
  const std::optional<at::Tensor>&pad_value, &bias;
};

// One call, with everything resolved that an item (image, kept head, window, part) needs.
template <class A>
struct Call {
  at::Tensor q, k, v, pad, bias;
  std::vector<int64_t> heads;
  TokenGrid grid;
  Tables<A> tables;
  double scale;
  int64_t batch, kept, tokens, dim, windows, largest;
  AttentionKernel<A> kernel;

  Call(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const Options& o)
      : q(checked(q_, q_)),
        k(checked(k_, q_)),
        v(checked(v_, q_)),
        bias(checked_bias(kOp, o.bias, q, o.grid.has_value(), c10::CppTypeToScalarType<A>::value)),
        heads(kept_heads(kOp, o.heads, q.size(1))),
        grid(token_grid(kOp, o.grid, o.window, q.size(2))),
        tables(kOp, o.cos, o.sin, o.prefix, o.interleaved,
               o.grid.has_value() ? o.window * o.window : q.size(2), q.size(3)),
        scale(o.scale),
        batch(q.size(0)),
        kept(static_cast<int64_t>(heads.size())),
        tokens(q.size(2)),
        dim(q.size(3)),
        windows(window_count(grid)),
        largest(largest_window(grid)),
        kernel(choose_kernel<A>(element_of(kOp, q))) {
    if (!o.pad_value.has_value()) return;
    pad = o.pad_value->to(c10::CppTypeToScalarType<A>::value).contiguous();
    TORCH_CHECK_VALUE(pad.dim() == 2 && pad.size(0) == q.size(1) && pad.size(1) == dim, kOp,
                      ": pad_value must be (", q.size(1), ", ", dim, "), got ", pad.sizes());
  }

  static at::Tensor checked(const at::Tensor& x, const at::Tensor& q) {
    TORCH_CHECK_VALUE(q.dim() == 4 && x.sizes() == q.sizes() && x.scalar_type() == q.scalar_type(),
                      kOp, ": tensors must be (B, H, N, D) of one shape and dtype, got ", x.sizes(),
                      " and ", q.sizes());
    return with_contiguous_rows(x);
  }

  int64_t items() const { return batch * kept * windows; }

  // Windows are the slowest index: the largest come first.
  int64_t window_of(int64_t item) const { return item / (batch * kept); }
  int64_t image_of(int64_t item) const { return item / kept % batch; }
  int64_t kept_of(int64_t item) const { return item % kept; }

  static Rows rows(const at::Tensor& x, int64_t b, int64_t h) {
    const auto offset = (b * x.stride(0) + h * x.stride(1)) * x.element_size();
    return {static_cast<const char*>(x.const_data_ptr()) + offset, x.stride(2)};
  }
  static MutableRows rows_to(const at::Tensor& x, int64_t b, int64_t h) {
    const auto offset = (b * x.stride(0) + h * x.stride(1)) * x.element_size();
    return {static_cast<char*>(x.mutable_data_ptr()) + offset, x.stride(2)};
  }

  AttentionHead<A> head(int64_t item) const {
    const int64_t b = image_of(item), h = heads[kept_of(item)];
    const A* value = pad.defined() ? pad.const_data_ptr<A>() + h * dim : nullptr;
    return {rows(q, b, h), rows(k, b, h),
            rows(v, b, h), window_span(grid, window_of(item), pad.defined()),
            dim,           static_cast<A>(scale),
            tables.view,   value,
            bias_of(b, h)};
  }

  Bias<A> bias_of(int64_t b, int64_t h) const {
    if (!bias.defined()) return {nullptr, 0};
    const A* data = bias.const_data_ptr<A>() + b % bias.size(0) * bias.stride(0);
    return {data + h * bias.stride(1), bias.stride(2)};
  }
};

template <class A>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                           const at::Tensor& v, const Options& options) {
  const Call<A> call(q, k, v, options);
  at::Tensor out = empty_heads(q, call.kept, false);
  at::Tensor lse = at::empty({call.batch, call.kept, call.tokens},
                             q.options().dtype(c10::CppTypeToScalarType<A>::value));
  if (out.numel() == 0) return {out, lse};
  // Query rows are independent, so few heads on many cores share a head's queries.
  const int64_t want = 4 * at::get_num_threads() / call.items();
  const int64_t parts =
      std::clamp<int64_t>(want, 1, std::max<int64_t>(1, call.largest / kMinQueries));
  A* lse_data = lse.mutable_data_ptr<A>();
  share_items(call.items() * parts, call.kernel.forward_bytes(call.largest, call.dim),
              [&](int64_t index, char* scratch) {
                const int64_t item = index / parts, part = index % parts;
                const AttentionHead<A> head = call.head(item);
                const int64_t n = span_tokens(head.span), b = call.image_of(item);
                const int64_t j = call.kept_of(item);
                call.kernel.forward(head, n * part / parts, n * (part + 1) / parts,
                                    Call<A>::rows_to(out, b, j),
                                    lse_data + (b * call.kept + j) * call.tokens, scratch);
              });
  return {out, lse};
}

// Sum over images and windows in a fixed order; heads that are not kept get zero.
template <class A>
at::Tensor sum_pads(const Call<A>& call, const std::vector<A>& parts, int64_t chunks,
                    const at::Tensor& pad_value) {
  at::Tensor total = at::zeros_like(call.pad);
  A* to = total.mutable_data_ptr<A>();
  for (int64_t item = 0; item < call.items(); ++item)
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t d = 0; d < call.dim; ++d)
        to[call.heads[call.kept_of(item)] * call.dim + d] +=
            parts[(item * chunks + c) * call.dim + d];
  return total.to(pad_value.scalar_type());
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class A>
Gradients backward(const at::Tensor& grad_, const at::Tensor& q, const at::Tensor& k,
                   const at::Tensor& v, const at::Tensor& out_, const at::Tensor& lse_,
                   const Options& options, bool bias_grad) {
  const Call<A> call(q, k, v, options);
  const at::Tensor grad = with_contiguous_rows(grad_), out = with_contiguous_rows(out_);
  const at::Tensor lse = lse_.contiguous();
  const std::vector<int64_t> want{call.batch, call.kept, call.tokens, call.dim};
  TORCH_CHECK_VALUE(
      grad.sizes() == want && out.sizes() == want && grad.scalar_type() == q.scalar_type() &&
          out.scalar_type() == q.scalar_type() && lse.sizes() == at::IntArrayRef(want).slice(0, 3),
      kOp, ": grad, out and lse must fit q and heads, got ", grad.sizes(), ", ", out.sizes(),
      " and ", lse.sizes());
  at::Tensor gradients[3];
  for (auto& x : gradients) x = empty_heads(q, q.size(1), options.heads.has_value());
  const auto& [dq, dk, dv] = gradients;
  TORCH_CHECK_VALUE(call.bias.defined() || !bias_grad, kOp, ": bias_grad needs a bias");
  at::Tensor dpad = at::zeros({0}, q.options()), dbias = at::zeros({0}, q.options());
  if (out.numel() == 0) {
    if (call.pad.defined()) dpad = at::zeros_like(*options.pad_value);
    if (bias_grad) dbias = at::zeros(options.bias->sizes(), options.bias->options());
    return {dq, dk, dv, dpad, dbias};
  }
  const BiasSums<A> bias_sums(bias_grad ? call.bias : at::Tensor(), call.batch, call.kept);
  // Heads fewer than threads: the chunks of a head's queries go to different threads, and their
  // shares of dk and dv are added up afterwards, in the order in which one thread would add them.
  const int64_t chunk = query_chunk(call.largest);
  const bool split = call.items() < at::get_num_threads() && !bias_sums.shared();
  const int64_t parts = split ? (call.largest + chunk - 1) / chunk : 1;
  const int64_t sums_size = 2 * sum_rows(call.largest) * sum_columns(call.dim);
  const A* lse_data = lse.const_data_ptr<A>();
  std::vector<A> pads(call.pad.defined() ? call.items() * parts * call.dim : 0);
  const auto arguments = [&](int64_t item, int64_t part, A* to) -> AttentionGrad<A> {
    const int64_t b = call.image_of(item), j = call.kept_of(item), h = call.heads[j];
    return {Call<A>::rows(grad, b, j),
            Call<A>::rows(out, b, j),
            lse_data + (b * call.kept + j) * call.tokens,
            Call<A>::rows_to(dq, b, h),
            Call<A>::rows_to(dk, b, h),
            Call<A>::rows_to(dv, b, h),
            pads.empty() ? nullptr : pads.data() + (item * parts + part) * call.dim,
            to};
  };
  const int64_t scratch_bytes = call.kernel.backward_bytes(call.largest, call.dim);
  const int64_t items = call.items();
  if (!split) {
    const int64_t sums_bytes = round_up(sums_size * sizeof(A), 64);
    const int64_t works = call.windows * bias_sums.works();
    share_items(works, sums_bytes + scratch_bytes, [&](int64_t work, char* scratch) {
      bias_sums.each(work, [&](int64_t item, A* to) {
        const AttentionHead<A> head = call.head(item);
        const AttentionGrad<A> args = arguments(item, 0, to);
        A* sums = reinterpret_cast<A*>(scratch);
        call.kernel.backward(head, args, 0, span_tokens(head.span), true, sums,
                             scratch + sums_bytes);
        call.kernel.backward_keys(head, args, sums, 1);
      });
    });
  } else {
    const at::Tensor memory = at::empty({items * parts * sums_size}, lse.options());
    A* sums = memory.mutable_data_ptr<A>();
    bias_sums.clear();  // not where they are used: several parts share them
    // A window smaller than the largest may need fewer chunks; its sums lie side by side.
    const auto count = [&](const AttentionHead<A>& head) {
      const int64_t n = span_tokens(head.span);
      return (n + query_chunk(n) - 1) / query_chunk(n);
    };
    share_items(items * parts, scratch_bytes, [&](int64_t index, char* scratch) {
      const int64_t item = index / parts, part = index % parts;
      const AttentionHead<A> head = call.head(item);
      if (part >= count(head)) return;
      const int64_t n = span_tokens(head.span), size = query_chunk(n);
      A* own = sums + item * parts * sums_size + part * 2 * sum_rows(n) * sum_columns(call.dim);
      // The chunks of one head add to different columns.
      call.kernel.backward(head, arguments(item, part, bias_sums.of(item)), part * size,
                           std::min(n, (part + 1) * size), true, own, scratch);
    });
    share_items(items, 0, [&](int64_t item, char*) {
      const AttentionHead<A> head = call.head(item);
      call.kernel.backward_keys(head, arguments(item, 0, nullptr), sums + item * parts * sums_size,
                                count(head));
    });
  }
  if (call.pad.defined()) dpad = sum_pads(call, pads, parts, *options.pad_value);
  if (bias_grad) dbias = bias_sums.total(*options.bias, call.heads);
  return {dq, dk, dv, dpad, dbias};
}

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> pruned_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::OptionalIntArrayRef heads,
    const OptionalTensor& cos, const OptionalTensor& sin, int64_t prefix, bool interleaved,
    double scale, at::OptionalIntArrayRef grid, int64_t window, const OptionalTensor& pad_value,
    const OptionalTensor& bias) {
  const Options options{heads, cos, sin, prefix, interleaved, scale, grid, window, pad_value, bias};
  return element_of(kOp, q) == Element::f64 ? forward<double>(q, k, v, options)
                                            : forward<float>(q, k, v, options);
}

Gradients pruned_attention_bwd(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                               at::OptionalIntArrayRef heads, const OptionalTensor& cos,
                               const OptionalTensor& sin, int64_t prefix, bool interleaved,
                               double scale, at::OptionalIntArrayRef grid, int64_t window,
                               const OptionalTensor& pad_value, const OptionalTensor& bias,
                               bool bias_grad) {
  const Options options{heads, cos, sin, prefix, interleaved, scale, grid, window, pad_value, bias};
  return element_of(kOp, q) == Element::f64
             ? backward<double>(grad, q, k, v, out, lse, options, bias_grad)
             : backward<float>(grad, q, k, v, out, lse, options, bias_grad);
}

}  // namespace
}  // namespace kdfast::cpu

TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("pruned_attention", &kdfast::cpu::pruned_attention);
  m.impl("pruned_attention_bwd", &kdfast::cpu::pruned_attention_bwd);
}
