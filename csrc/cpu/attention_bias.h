// SPDX-License-Identifier: Apache-2.0
// The additive bias of an attention call: its tensor as the kernels read it, and the sums that its
// gradient is made of.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/isa/pruned_attention.h"
#include "errors.h"
#include "tensor.h"

namespace kdfast::cpu {

// bias (G, H, N, N) in the dtype of the sums, with contiguous rows; undefined without one. What the
// caller expanded stays expanded: a mask for all heads is converted once.
inline Tensor checked_bias(const char* op, const OptionalTensor& bias, const Tensor& q,
                           bool windows, Type dtype) {
  if (!bias.has_value()) return {};
  const Sizes shape = bias->sizes();
  KDFAST_CHECK_VALUE(bias->dim() == 4 && shape[0] > 0 && q.size(0) % shape[0] == 0 &&
                         shape[1] == q.size(1) && shape[2] == q.size(2) && shape[3] == q.size(2),
                     op, ": bias must be (G, H, N, N) with a G that divides B, got ", shape,
                     " for q ", q.sizes());
  KDFAST_CHECK_VALUE(!windows, op, ": bias must be None in a call with a window");
  Ints sizes(shape.begin(), shape.end()), strides(bias->strides().begin(), bias->strides().end());
  for (int64_t d = 0; d < 3; ++d)
    if (strides[d] == 0) sizes[d] = std::min<int64_t>(sizes[d], 1);
  Tensor small = bias->as_strided(sizes, strides).to(dtype);
  if (small.stride(3) != 1) small = small.contiguous();
  for (int64_t d = 0; d < 4; ++d) strides[d] = sizes[d] < shape[d] ? 0 : small.stride(d);
  return small.as_strided(shape, strides);
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
  BiasSums(const Tensor& bias, int64_t batch, int64_t kept) : items_(batch * kept) {
    if (!bias.defined() || items_ == 0) return;
    biases_ = bias.size(0);
    kept_ = kept;
    tokens_ = bias.size(2);
    turns_ = batch / biases_;
    const int64_t pairs = biases_ * kept_;
    const int64_t bytes =
        product_of("pruned_attention", {pairs, tokens_, bias_columns(tokens_), sizeof(A)});
    slices_ = std::min(turns_, std::max<int64_t>(1, (kWorks + pairs - 1) / pairs));
    slices_ = std::max<int64_t>(1, std::min(slices_, kBytes / std::max<int64_t>(1, bytes)));
    sums_ = empty({slices_, biases_, kept_, tokens_, bias_columns(tokens_)}, type_of<A>);
  }

  // Pieces of work that may run side by side; one item each where no sum is shared.
  int64_t works() const { return sums_.defined() ? slices_ * biases_ * kept_ : items_; }
  bool shared() const { return works() < items_; }

  // The sums of a piece, null without gradient, are its own to clear before it begins.
  A* of(int64_t piece) const {
    return sums_.defined() ? sums_.mutable_data_ptr<A>() + piece * matrix() : nullptr;
  }
  void clear() const {
    if (sums_.defined()) sums_.zero_();
  }

  // work(item, sums) for the items (image, kept head) of one piece, whose sums are cleared while
  // they are about to be used.
  template <class F>
  void each(int64_t piece, const F& work) const {
    A* sums = of(piece);
    if (sums == nullptr) return work(piece, sums);
    std::memset(sums, 0, matrix() * sizeof(A));
    const int64_t pair = piece % (biases_ * kept_), slice = piece / (biases_ * kept_);
    for (int64_t turn = turns_ * slice / slices_; turn < turns_ * (slice + 1) / slices_; ++turn)
      work(turn * biases_ * kept_ + pair, sums);
  }

  // The gradient (G, H, N, N): slices in order, rounded once; zero for heads that are not kept.
  Tensor total(const Tensor& bias, const std::vector<int64_t>& heads) const {
    const bool all = kept_ == bias.size(1);
    const Tensor out = all ? empty(bias.sizes(), type_of<A>) : zeros(bias.sizes(), type_of<A>);
    if (!sums_.defined()) return out.zero_().to_type_of(bias);
    A* data = out.mutable_data_ptr<A>();
    const int64_t strips = (tokens_ + kStrip - 1) / kStrip;
    parallel_for(biases_ * kept_ * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = i / strips, group = pair / kept_, head = heads[pair % kept_];
        A* to = data + (group * bias.size(1) + head) * tokens_ * tokens_;
        for (int64_t key = 0; key < tokens_; key += kStrip)
          turn(pair, key, i % strips * kStrip, to);
      }
    });
    return out.to_type_of(bias);
  }

 private:
  // Sides of the blocks that are summed up and transposed in a cache of the first level.
  static constexpr int64_t kStrip = 16;
  static_assert(kStrip == kLanes, "blocks end within bias_columns");

  // Writes the block of keys from `key` on and queries from `query` on.
  void turn(int64_t pair, int64_t key, int64_t query, A* to) const {
    const int64_t columns = bias_columns(tokens_), step = biases_ * kept_ * matrix();
    const int64_t keys = std::min(kStrip, tokens_ - key);
    const int64_t queries = std::min(kStrip, tokens_ - query);
    const A* from = of(pair) + key * columns + query;
    A block[kStrip][kStrip];
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t q = 0; q < kStrip; ++q) block[k][q] = from[k * columns + q];
    for (int64_t slice = 1; slice < slices_; ++slice)
      for (int64_t k = 0; k < keys; ++k)
        for (int64_t q = 0; q < kStrip; ++q) block[k][q] += from[slice * step + k * columns + q];
    for (int64_t q = 0; q < queries; ++q)
      for (int64_t k = 0; k < keys; ++k) to[(query + q) * tokens_ + key + k] = block[k][q];
  }

  int64_t matrix() const { return tokens_ * bias_columns(tokens_); }

  int64_t items_, biases_ = 0, kept_ = 0, tokens_ = 0, turns_ = 0, slices_ = 0;
  Tensor sums_;
};

}  // namespace kdfast::cpu
