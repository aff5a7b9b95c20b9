// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/pruned_attention.h"

#include <algorithm>
#include <tuple>

#include "cpu/attention_bias.h"
#include "cpu/attention_boundary.h"
#include "cpu/attention_products.h"
#include "cpu/element_of.h"
#include "register.h"

namespace kdfast::cpu {
namespace {

constexpr const char* kOp = "pruned_attention";
// Below this many queries a part of a head costs more in packing keys than it spreads.
constexpr int64_t kMinQueries = 96;

// The op's arguments after q, k and v.
struct Options {
  AttentionOptions attention;
  const OptionalTensor& bias;
  int64_t products;
};

template <class A>
const AttentionKernel<A>& kernel_of(Element element, Products fp32) {
  const AttentionKernels<A>& kernels = attention_kernels<A>(products_of(element, fp32));
  return kernels.attention[static_cast<int>(element)];
}

// One call, whose items may be cut into parts of their queries.
template <class A>
struct Call : StudentCall<A> {
  Tensor bias;
  const AttentionKernel<A>& kernel;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o)
      : StudentCall<A>(kOp, q, k, v, o.attention),
        bias(checked_bias(kOp, o.bias, this->q, o.attention.grid.has_value(), this->kDtype)),
        kernel(kernel_of<A>(element_of(kOp, q), checked_products(kOp, o.products))) {}

  AttentionHead<A> head(int64_t item) const {
    const int64_t b = this->image_of(item), h = this->heads[this->kept_of(item)];
    return {rows_of(this->q, b, h),
            rows_of(this->k, b, h),
            rows_of(this->v, b, h),
            this->span_of(item),
            this->dim,
            this->scale,
            this->tables.view,
            this->pad_of(h),
            bias_of(b, h)};
  }

  Bias<A> bias_of(int64_t b, int64_t h) const {
    if (!bias.defined()) return {nullptr, 0};
    const A* data = bias.const_data_ptr<A>() + b % bias.size(0) * bias.stride(0);
    return {data + h * bias.stride(1), bias.stride(2)};
  }
};

template <class A>
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Options& options) {
  const Call<A> call(q, k, v, options);
  const Tensor out = empty_heads(q, call.kept, false);
  const Tensor lse = empty({call.batch, call.kept, call.tokens}, call.kDtype);
  if (out.numel() == 0) return {out, lse};
  if (!call.is_finite()) return {call.not_a_number(out), call.not_a_number(lse)};
  // Query rows are independent, so few heads on many cores share a head's queries.
  const int64_t want = 4 * num_threads() / call.items();
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
                                    rows_to(out, b, j),
                                    lse_data + (b * call.kept + j) * call.tokens, scratch);
              });
  return {out, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
Gradients backward(const Tensor& grad_, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out_, const Tensor& lse_, const Options& options, bool bias_grad) {
  const Call<A> call(q, k, v, options);
  const Tensor out = checked(kOp, out_, out_), grad = checked(kOp, grad_, out_);
  const Tensor lse = lse_.contiguous();
  const Ints want{call.batch, call.kept, call.tokens, call.dim};
  KDFAST_CHECK_VALUE(same(out.sizes(), want) && out.type() == q.type() &&
                         same(lse.sizes(), Sizes(want).first(3)) && lse.type() == call.kDtype,
                     kOp, ": grad, out and lse must fit q and heads, got ", grad.sizes(), ", ",
                     out.sizes(), " and ", lse.sizes());
  Tensor gradients[3];
  for (auto& x : gradients) x = empty_heads(q, q.size(1), call.kept < q.size(1));
  const auto& [dq, dk, dv] = gradients;
  KDFAST_CHECK_VALUE(call.bias.defined() || !bias_grad, kOp, ": bias_grad needs a bias");
  Tensor dpad = empty_as(q, {0}), dbias = empty_as(q, {0});
  if (out.numel() == 0 || !call.is_finite()) {
    if (call.pad.defined())
      dpad = zeros_as(*options.attention.pad_value, options.attention.pad_value->sizes());
    if (bias_grad) dbias = zeros_as(*options.bias, options.bias->sizes());
    if (out.numel() == 0) return {dq, dk, dv, dpad, dbias};
    for (const Tensor& x : gradients) call.spoil(x, 1);
    if (call.pad.defined()) call.spoil(dpad, 0);
    if (bias_grad) call.spoil(dbias, 1);
    return {dq, dk, dv, dpad, dbias};
  }
  const BiasSums<A> bias_sums(bias_grad ? call.bias : Tensor(), call.batch, call.kept);
  // Heads fewer than threads: the chunks of a head's queries go to different threads, and their
  // shares of dk and dv are added up afterwards, in the order in which one thread would add them.
  const int64_t chunk = query_chunk(call.largest);
  const bool split = call.items() < num_threads() && !bias_sums.shared();
  const int64_t parts = split ? (call.largest + chunk - 1) / chunk : 1;
  const int64_t sums_size = 2 * sum_rows(call.largest) * sum_columns(call.dim);
  const A* lse_data = lse.const_data_ptr<A>();
  std::vector<A> pads(call.pad.defined() ? product_of(kOp, {call.items(), parts, call.dim})
                                         : int64_t{0});
  const auto arguments = [&](int64_t item, int64_t part, A* to) -> AttentionGrad<A> {
    const int64_t b = call.image_of(item), j = call.kept_of(item), h = call.heads[j];
    return {rows_of(grad, b, j),
            rows_of(out, b, j),
            lse_data + (b * call.kept + j) * call.tokens,
            rows_to(dq, b, h),
            rows_to(dk, b, h),
            rows_to(dv, b, h),
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
    const Tensor memory = empty({product_of(kOp, {items, parts, sums_size})}, call.kDtype);
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
  if (call.pad.defined()) dpad = call.sum_pads(pads, parts, *options.attention.pad_value);
  if (bias_grad) dbias = bias_sums.total(*options.bias, call.heads);
  return {dq, dk, dv, dpad, dbias};
}

std::tuple<Tensor, Tensor> pruned_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const OptionalInts& heads, const OptionalTensor& cos,
                                            const OptionalTensor& sin, int64_t prefix,
                                            bool interleaved, double scale,
                                            const OptionalInts& grid, int64_t window,
                                            const OptionalTensor& pad_value,
                                            const OptionalTensor& bias, int64_t products) {
  const Options options{
      {heads, cos, sin, prefix, interleaved, scale, grid, window, pad_value}, bias, products};
  return element_of(kOp, q) == Element::f64 ? forward<double>(q, k, v, options)
                                            : forward<float>(q, k, v, options);
}

Gradients pruned_attention_bwd(const Tensor& grad, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& out, const Tensor& lse,
                               const OptionalInts& heads, const OptionalTensor& cos,
                               const OptionalTensor& sin, int64_t prefix, bool interleaved,
                               double scale, const OptionalInts& grid, int64_t window,
                               const OptionalTensor& pad_value, const OptionalTensor& bias,
                               bool bias_grad, int64_t products) {
  const Options options{
      {heads, cos, sin, prefix, interleaved, scale, grid, window, pad_value}, bias, products};
  return element_of(kOp, q) == Element::f64
             ? backward<double>(grad, q, k, v, out, lse, options, bias_grad)
             : backward<float>(grad, q, k, v, out, lse, options, bias_grad);
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("pruned_attention", TORCH_BOX(&kdfast::cpu::pruned_attention));
  m.impl("pruned_attention_bwd", TORCH_BOX(&kdfast::cpu::pruned_attention_bwd));
}
