// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/attention_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/attention_boundary.h"
#include "cpu/element_of.h"
#include "dispatch.h"

namespace kdfast::cpu {
namespace {

constexpr const char* kOp = "attention_entropy";

template <class A>
EntropyKernel<A> choose_kernel([[maybe_unused]] Element element) {
  if constexpr (sizeof(A) == 8) {
    return entropy_generic_f64();
  } else {
#if KDFAST_X86
    if (element == Element::bf16) {
      if (isa() == Isa::amx) return entropy_amx();
      if (isa() == Isa::amx_emulated) return entropy_amx_emulated();
      if (isa() == Isa::avx512_bf16) return entropy_avx512_bf16();
    }
    if (isa() >= Isa::avx512) return entropy_avx512();
    if (isa() >= Isa::avx2) return entropy_avx2();
#endif
    return entropy_generic();
  }
}

Rows rows_of(const at::Tensor& x, int64_t b, int64_t h) {
  const int64_t offset = (b * x.stride(0) + h * x.stride(1)) * x.element_size();
  return {static_cast<const char*>(x.const_data_ptr()) + offset, x.stride(2)};
}

template <class A>
at::Tensor entropy(const at::Tensor& q, const at::Tensor& k, const Tables<A>& tables, double scale,
                   const TokenGrid& grid, bool pads) {
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  const at::Tensor out =
      at::empty({batch, heads, tokens}, q.options().dtype(c10::CppTypeToScalarType<A>::value));
  if (out.numel() == 0) return out;
  A* data = out.mutable_data_ptr<A>();
  const EntropyKernel<A> kernel = choose_kernel<A>(element_of(kOp, q));
  const int64_t largest = largest_window(grid);
  share_items(batch * heads * window_count(grid), kernel.scratch_bytes(largest, dim),
              [&](int64_t item, char* scratch) {
                // Windows are the slowest index: the largest come first.
                const int64_t head = item % (batch * heads), b = head / heads, h = head % heads;
                kernel.rows({rows_of(q, b, h), rows_of(k, b, h), element_of(kOp, q), dim,
                             static_cast<A>(scale), tables.view},
                            window_span(grid, item / (batch * heads), pads), data + head * tokens,
                            scratch);
              });
  return out;
}

at::Tensor attention_entropy(const at::Tensor& q_, const at::Tensor& k_,
                             const std::optional<at::Tensor>& cos,
                             const std::optional<at::Tensor>& sin, int64_t prefix, bool interleaved,
                             double scale, at::OptionalIntArrayRef grid, int64_t window,
                             bool pads) {
  TORCH_CHECK_VALUE(
      q_.dim() == 4 && q_.sizes() == k_.sizes() && q_.scalar_type() == k_.scalar_type(), kOp,
      ": q and k must be (B, H, N, D) of one shape and dtype, got ", q_.sizes(), " and ",
      k_.sizes());
  const at::Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_);
  const TokenGrid tokens = token_grid(kOp, grid, window, q.size(2));
  const int64_t rows = grid.has_value() ? window * window : q.size(2);
  const auto run = [&]<class A>(A) {
    const Tables<A> tables(kOp, cos, sin, prefix, interleaved, rows, q.size(3));
    return entropy<A>(q, k, tables, scale, tokens, pads);
  };
  return q.scalar_type() == at::kDouble ? run(double()) : run(float());
}

}  // namespace
}  // namespace kdfast::cpu

TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("attention_entropy", &kdfast::cpu::attention_entropy); }
