// SPDX-License-Identifier: Apache-2.0
// Checks and layout of head_gather that the CPU and the CUDA boundary share.
#pragma once

#include "errors.h"
#include "head_gather.h"
#include "tensor.h"

namespace kdfast {

// x (..., src_heads * head_dim, ...) contiguous; unit in bytes divides head_dim * inner * itemsize.
inline HeadLayout head_layout(const Tensor& x, int64_t head_dim, int64_t dim, int64_t dst_heads,
                              int64_t unit) {
  HeadLayout m{};
  const int64_t heads = x.size(dim) / head_dim;
  // Of an empty tensor the sizes may have any product.
  int64_t inner = 1;
  for (int64_t d = dim + 1; d < x.dim(); ++d) inner = product_of("head_gather", {inner, x.size(d)});
  m.outer = 1;
  for (int64_t d = 0; d < dim; ++d) m.outer = product_of("head_gather", {m.outer, x.size(d)});
  m.run = product_of("head_gather", {head_dim, inner, x.element_size()}) / unit;
  m.src_heads = static_cast<int32_t>(heads);
  m.dst_heads = static_cast<int32_t>(dst_heads);
  return m;
}

// The heads of head_dim along a dimension of x.
inline int64_t count_heads(const Tensor& x, int64_t head_dim, int64_t dim) {
  KDFAST_CHECK_VALUE(dim >= 0 && dim < x.dim() && head_dim > 0 && x.size(dim) % head_dim == 0,
                     "head_gather: dim ", dim, " of ", x.sizes(), " must hold heads of ", head_dim);
  return x.size(dim) / head_dim;
}

inline void check_heads(const Ints& heads, int64_t num_heads) {
  KDFAST_CHECK_VALUE(num_heads >= 0 && num_heads <= kMaxHeads, "head_gather: at most ", kMaxHeads,
                     " heads, got ", num_heads);
  bool seen[kMaxHeads] = {};
  for (const int64_t h : heads) {
    KDFAST_CHECK_VALUE(h >= 0 && h < num_heads, "head_gather: head must be in [0, ", num_heads,
                       "), got ", h);
    // The gradient of a head has one place.
    KDFAST_CHECK_VALUE(!seen[h], "head_gather: heads must not repeat one, got ", heads);
    seen[h] = true;
  }
}

// Checks the arguments of the backward: grad holds the gathered heads of num_heads.
inline void check_scatter(const Tensor& grad, const Ints& heads, int64_t head_dim, int64_t dim,
                          int64_t num_heads) {
  const int64_t held = count_heads(grad, head_dim, dim);
  KDFAST_CHECK_VALUE(held == static_cast<int64_t>(heads.size()), "head_gather: grad must hold ",
                     heads.size(), " heads, got ", held);
  check_heads(heads, num_heads);
  product_of("head_gather", {num_heads, head_dim});
}

inline Tensor resized(const Tensor& x, int64_t dim, int64_t size) {
  Ints shape(x.sizes().begin(), x.sizes().end());
  shape[dim] = size;
  return empty_as(x, shape);
}

// Gather: destination head j reads source head heads[j].
inline void map_gather(HeadLayout& m, const Ints& heads) {
  for (size_t j = 0; j < heads.size(); ++j) m.source[j] = static_cast<int16_t>(heads[j]);
}

// Scatter: destination head heads[j] reads source head j, all others are zero.
inline void map_scatter(HeadLayout& m, const Ints& heads) {
  for (int32_t h = 0; h < m.dst_heads; ++h) m.source[h] = -1;
  for (size_t j = 0; j < heads.size(); ++j) m.source[heads[j]] = static_cast<int16_t>(j);
}

}  // namespace kdfast
