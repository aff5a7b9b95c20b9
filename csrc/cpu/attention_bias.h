// SPDX-License-Identifier: Apache-2.0
// The additive bias of an attention call: its tensor as the kernels read it, and the sums that its
// gradient is made of.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/isa/pruned_attention.h"

namespace kdfast::cpu {

// bias (G, H, N, N) in the dtype of the sums, with contiguous rows; undefined without one. What the
// caller expanded stays expanded: a mask for all heads is converted once.
inline at::Tensor checked_bias(const char* op, const std::optional<at::Tensor>& bias,
                               const at::Tensor& q, bool windows, at::ScalarType dtype) {
  if (!bias.has_value()) return {};
  const at::IntArrayRef shape = bias->sizes();
  TORCH_CHECK_VALUE(bias->dim() == 4 && shape[0] > 0 && q.size(0) % shape[0] == 0 &&
                        shape[1] == q.size(1) && shape[2] == q.size(2) && shape[3] == q.size(2),
                    op, ": bias must be (G, H, N, N) with a G that divides B, got ", shape,
                    " for q ", q.sizes());
  TORCH_CHECK_VALUE(!windows, op, ": bias must be None in a call with a window");
  at::Tensor small = *bias;
  for (int64_t d = 0; d < 3; ++d)
    if (small.stride(d) == 0 && small.size(d) > 1) small = small.narrow(d, 0, 1);
  small = small.to(dtype);
  if (small.stride(3) != 1) small = small.contiguous();
  return small.expand(shape);
}

// The gradient of the bias: transposed sums of dS over the images of a slice of the batch, for each
// slice, bias and kept head. The shapes alone fix the slices, and a slice is worked through in
// order, so the result does not depend on the number of threads.
template <class A>
class BiasSums {
 public:
  // Enough pieces of work for many cores, but not more memory than this.
  static constexpr int64_t kWorks = 64, kBytes = int64_t{64} << 20;

  // bias (G, H, N, N); undefined where no gradient of it is wanted.
  BiasSums(const at::Tensor& bias, int64_t batch, int64_t kept) : items_(batch * kept) {
    if (!bias.defined() || items_ == 0) return;
    biases_ = bias.size(0);
    kept_ = kept;
    tokens_ = bias.size(2);
    turns_ = batch / biases_;
    const int64_t pairs = biases_ * kept_, bytes = pairs * matrix() * sizeof(A);
    slices_ = std::min(turns_, std::max<int64_t>(1, (kWorks + pairs - 1) / pairs));
    slices_ = std::max<int64_t>(1, std::min(slices_, kBytes / std::max<int64_t>(1, bytes)));
    sums_ = at::zeros({slices_, biases_, kept_, tokens_, bias_columns(tokens_)},
                      bias.options().dtype(c10::CppTypeToScalarType<A>::value));
  }

  // Pieces of work that may run side by side; one item each where no sum is shared.
  int64_t works() const { return sums_.defined() ? slices_ * biases_ * kept_ : items_; }
  bool shared() const { return works() < items_; }

  // work(item, sums) for the items (image, kept head) of one piece; sums are null without gradient.
  template <class F>
  void each(int64_t piece, const F& work) const {
    if (!sums_.defined()) return work(piece, static_cast<A*>(nullptr));
    const int64_t pair = piece % (biases_ * kept_), slice = piece / (biases_ * kept_);
    A* sums = sums_.mutable_data_ptr<A>() + piece * matrix();
    for (int64_t turn = turns_ * slice / slices_; turn < turns_ * (slice + 1) / slices_; ++turn)
      work(turn * biases_ * kept_ + pair, sums);
  }

  // The gradient (G, H, N, N): slices in order, rounded once; zero for heads that are not kept.
  at::Tensor total(const at::Tensor& bias, const std::vector<int64_t>& heads) const {
    at::Tensor out = at::zeros(bias.sizes(), bias.options());
    if (!sums_.defined()) return out;
    at::Tensor sum = sums_[0];
    for (int64_t slice = 1; slice < slices_; ++slice) sum.add_(sums_[slice]);
    sum = sum.narrow(3, 0, tokens_).transpose(2, 3);
    if (kept_ == bias.size(1) && std::is_sorted(heads.begin(), heads.end())) return out.copy_(sum);
    for (int64_t j = 0; j < kept_; ++j) out.select(1, heads[j]).copy_(sum.select(1, j));
    return out;
  }

 private:
  int64_t matrix() const { return tokens_ * bias_columns(tokens_); }

  int64_t items_, biases_ = 0, kept_ = 0, tokens_ = 0, turns_ = 0, slices_ = 0;
  at::Tensor sums_;
};

}  // namespace kdfast::cpu
