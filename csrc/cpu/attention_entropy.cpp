// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/attention_entropy.h"

#include "cpu/attention_boundary.h"
#include "cpu/attention_products.h"
#include "cpu/element_of.h"
#include "register.h"

namespace kdfast::cpu {
namespace {

constexpr const char* kOp = "attention_entropy";

// Precision settings of fp32 do not reach it: only bf16 is multiplied as bf16.
template <class A>
const EntropyKernel<A>& kernel_of(Element element) {
  const Products products = element == Element::bf16 ? Products::bf16 : Products::fp32;
  return attention_kernels<A>(products).entropy;
}

template <class A>
Tensor entropy(const Tensor& q, const Tensor& k, const Tables<A>& tables, double scale,
               const TokenGrid& grid, bool pads) {
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  const Tensor out = empty({batch, heads, tokens}, type_of<A>);
  if (out.numel() == 0) return out;
  // The kernels keep extreme scores finite, so they would hide a factor that is not.
  if (!std::isfinite(static_cast<A>(scale))) return out.fill_nan_();
  A* data = out.mutable_data_ptr<A>();
  const EntropyKernel<A>& kernel = kernel_of<A>(element_of(kOp, q));
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

Tensor attention_entropy(const Tensor& q_, const Tensor& k_, const OptionalTensor& cos,
                         const OptionalTensor& sin, int64_t prefix, bool interleaved, double scale,
                         const OptionalInts& grid, int64_t window, bool pads) {
  const Tensor q = checked(kOp, q_, q_), k = checked(kOp, k_, q_);
  const TokenGrid tokens = token_grid(kOp, grid, window, q.size(2));
  KDFAST_CHECK_VALUE(grid.has_value() || !pads, kOp, ": pads need a grid");
  check_matrix(kOp, largest_window(tokens), q.size(3));
  const int64_t rows = table_rows(grid, window, q);
  const auto run = [&]<class A>(A) {
    const Tables<A> tables(kOp, cos, sin, prefix, interleaved, rows, q.size(3));
    return entropy<A>(q, k, tables, scale, tokens, pads);
  };
  return q.type() == Type::f64 ? run(double()) : run(float());
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("attention_entropy", TORCH_BOX(&kdfast::cpu::attention_entropy));
}
