// SPDX-License-Identifier: Apache-2.0
// What the boundary files of attention ops share: memory-safety checks, tables, work sharing.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/attention_geometry.h"
#include "cpu/isa/pruned_attention.h"
#include "errors.h"
#include "tensor.h"

namespace kdfast::cpu {

// What the ops say of the student's attention after its tensors, in the schema's order.
struct AttentionOptions {
  const OptionalInts& heads;
  const OptionalTensor &cos, &sin;
  int64_t prefix;
  bool interleaved;
  double scale;
  const OptionalInts& grid;
  int64_t window;
  const OptionalTensor& pad_value;  // (H, D)
};

// A tensor (B, H, N, D) whose rows of D elements are contiguous; copies only if they are not.
inline Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
}

// The same of x, which must be like another tensor (B, H, N, D).
inline Tensor checked(const char* op, const Tensor& x, const Tensor& like) {
  KDFAST_CHECK_VALUE(
      like.dim() == 4 && like.size(3) > 0 && same_sizes(x, like) && x.type() == like.type(), op,
      ": tensors must be (B, H, N, D) of one shape and dtype with D >= 1, got ", x.sizes(), " and ",
      like.sizes());
  return with_contiguous_rows(x);
}

// The rows of head h of image b, to be read or to be written.
inline Rows rows_of(const Tensor& x, int64_t b, int64_t h) {
  const int64_t offset = (b * x.stride(0) + h * x.stride(1)) * x.element_size();
  return {static_cast<const char*>(x.const_data_ptr()) + offset, x.stride(2)};
}
inline MutableRows rows_to(const Tensor& x, int64_t b, int64_t h) {
  const int64_t offset = (b * x.stride(0) + h * x.stride(1)) * x.element_size();
  return {static_cast<char*>(x.mutable_data_ptr()) + offset, x.stride(2)};
}

// (B, heads, N, D) like x, in the memory order (B, N, heads, D).
inline Tensor empty_heads(const Tensor& x, int64_t heads, bool zero) {
  const Ints strides = ordered_strides(Ints{x.size(0), x.size(2), heads, x.size(3)});
  const Tensor out = empty_as(x, Ints{x.size(0), heads, x.size(2), x.size(3)},
                              Ints{strides[0], strides[2], strides[1], strides[3]});
  return zero ? out.zero_() : out;
}

// The heads that are named, each in [0, count); all of them if none are. A kept head must be
// `distinct`: its gradient has one place.
inline std::vector<int64_t> kept_heads(const char* op, const OptionalInts& heads, int64_t count,
                                       bool distinct = true) {
  std::vector<int64_t> kept;
  if (!heads.has_value()) {
    for (int64_t h = 0; h < count; ++h) kept.push_back(h);
    return kept;
  }
  std::vector<bool> seen(count);
  for (const int64_t h : *heads) {
    KDFAST_CHECK_VALUE(h >= 0 && h < count, op, ": head must be in [0, ", count, "), got ", h);
    KDFAST_CHECK_VALUE(!distinct || !seen[h], op, ": heads must not repeat one, got ", *heads);
    seen[h] = true;
    kept.push_back(h);
  }
  return kept;
}

inline TokenGrid token_grid(const char* op, const OptionalInts& grid, int64_t size,
                            int64_t tokens) {
  if (!grid.has_value()) return {1, tokens, tokens > 0 ? tokens : 1};
  KDFAST_CHECK_VALUE(grid->size() == 2 && (*grid)[0] > 0 && (*grid)[1] > 0 && size > 0 &&
                         product_is((*grid)[0], (*grid)[1], tokens),
                     op, ": grid must hold ", tokens, " tokens and window be positive, got ", *grid,
                     " and ", size);
  product_of(op, {size, size});  // the places in a window
  return {(*grid)[0], (*grid)[1], size};
}

// What every later product of sizes of a head inside a window rests on.
inline void check_matrix(const char* op, int64_t tokens, int64_t dim) {
  constexpr int64_t kMost = int64_t{1} << 40;
  KDFAST_CHECK_VALUE(product_of(op, {tokens, dim}) <= kMost, op, ": a head must have at most ",
                     kMost, " values, got ", tokens, " tokens of ", dim);
}

// Tokens that a rotary table counts: those of q, or the places in a window.
inline int64_t table_rows(const OptionalInts& grid, int64_t window, const Tensor& q) {
  return grid.has_value() ? window * window : q.size(2);
}

// Tokens of the first window, which is the largest; none in an empty grid, which has no windows.
inline int64_t largest_window(const TokenGrid& grid) {
  return std::min(grid.rows, grid.size) * std::min(grid.cols, grid.size);
}

// Rotary tables in the dtype A of the sums, a row for each of `rows` tokens or places in a window;
// owns the copies that `view` points into.
template <class A>
struct Tables {
  Tensor cos, sin;
  RotaryTable<A> view{nullptr, nullptr, 0, 0, true};

  Tables(const char* op, const OptionalTensor& cos_table, const OptionalTensor& sin_table,
         int64_t prefix, bool interleaved, int64_t rows, int64_t dim) {
    KDFAST_CHECK_VALUE(cos_table.has_value() == sin_table.has_value(), op, ": cos needs sin");
    if (!cos_table.has_value()) return;
    cos = cos_table->to(type_of<A>).contiguous();
    sin = sin_table->to(type_of<A>).contiguous();
    KDFAST_CHECK_VALUE(cos.dim() == 2 && same_sizes(cos, sin) && cos.size(1) == dim &&
                           dim % 2 == 0 && prefix >= 0 && prefix <= rows &&
                           (cos.size(0) == rows || cos.size(0) == rows - prefix),
                       op, ": cos and sin must be (", rows, " [- ", prefix, "], ", dim, "), got ",
                       cos.sizes(), " and ", sin.sizes());
    view = {cos.template const_data_ptr<A>(), sin.template const_data_ptr<A>(), prefix,
            rows - cos.size(0), interleaved};
  }
};

// The student's side of one call, with everything resolved that an item (image, kept head, window)
// needs. Windows are the slowest index of an item: the largest come first.
template <class A>
struct StudentCall {
  static constexpr Type kDtype = type_of<A>;

  Tensor q, k, v, pad;
  std::vector<int64_t> heads;
  TokenGrid grid;
  Tables<A> tables;
  A scale;
  int64_t batch, kept, tokens, dim, windows, largest;

  StudentCall(const char* op, const Tensor& q_, const Tensor& k_, const Tensor& v_,
              const AttentionOptions& o)
      : q(checked(op, q_, q_)),
        k(checked(op, k_, q_)),
        v(checked(op, v_, q_)),
        heads(kept_heads(op, o.heads, q.size(1))),
        grid(token_grid(op, o.grid, o.window, q.size(2))),
        tables(op, o.cos, o.sin, o.prefix, o.interleaved, table_rows(o.grid, o.window, q),
               q.size(3)),
        scale(static_cast<A>(o.scale)),
        batch(q.size(0)),
        kept(static_cast<int64_t>(heads.size())),
        tokens(q.size(2)),
        dim(q.size(3)),
        windows(window_count(grid)),
        largest(largest_window(grid)) {
    check_matrix(op, largest, dim);
    if (!o.pad_value.has_value()) return;
    pad = o.pad_value->to(kDtype).contiguous();
    KDFAST_CHECK_VALUE(
        o.grid.has_value() && pad.dim() == 2 && pad.size(0) == q.size(1) && pad.size(1) == dim, op,
        ": pad_value must be (", q.size(1), ", ", dim, ") in a call with a grid, got ",
        pad.sizes());
  }

  int64_t items() const { return batch * kept * windows; }
  int64_t image_of(int64_t item) const { return item / kept % batch; }
  int64_t kept_of(int64_t item) const { return item % kept; }
  WindowSpan span_of(int64_t item) const {
    return window_span(grid, item / (batch * kept), pad.defined());
  }
  const A* pad_of(int64_t head) const {
    return pad.defined() ? pad.const_data_ptr<A>() + head * dim : nullptr;
  }

  // The kernels keep extreme scores finite, so they would hide a factor that is not.
  bool is_finite() const { return std::isfinite(scale); }
  // x, a result for each kept head of dimension 1, as a factor that is not finite makes it.
  static Tensor not_a_number(const Tensor& x) { return x.fill_nan_(); }
  // The same of the kept heads of a gradient, whose heads lie in dimension `at`.
  void spoil(const Tensor& x, int64_t at) const {
    Ints sizes(x.sizes().begin(), x.sizes().end()), strides(x.strides().begin(), x.strides().end());
    sizes.erase(sizes.begin() + at);
    strides.erase(strides.begin() + at);
    for (const int64_t h : heads) not_a_number(x.as_strided(sizes, strides, h * x.stride(at)));
  }

  // The gradient of the padded keys' value from `chunks` parts (D,) of each item: their sum over
  // images and windows in a fixed order, and zero for heads that are not kept.
  Tensor sum_pads(const std::vector<A>& parts, int64_t chunks, const Tensor& like) const {
    const Tensor total = zeros(pad.sizes(), kDtype);
    A* to = total.mutable_data_ptr<A>();
    for (int64_t item = 0; item < items(); ++item)
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t d = 0; d < dim; ++d)
          to[heads[kept_of(item)] * dim + d] += parts[(item * chunks + c) * dim + d];
    return total.to_type_of(like);
  }
};

// Runs work(item, scratch) for every item in [0, items) on torch's threads. Threads take items one
// by one, since windows differ in size; an item's result must not depend on its thread.
template <class F>
void share_items(int64_t items, int64_t scratch_bytes, const F& work) {
  if (items == 0) return;
  constexpr int64_t kAlign = 64;
  const int64_t threads = std::min<int64_t>(items, num_threads());
  const int64_t stride = (scratch_bytes + kAlign - 1) / kAlign * kAlign;
  const int64_t bytes = product_of("kdfast", {threads, stride});
  const Tensor memory = empty({bytes + kAlign}, Type::u8);
  char* base = static_cast<char*>(memory.mutable_data_ptr());
  base += (kAlign - reinterpret_cast<uintptr_t>(base) % kAlign) % kAlign;
  std::atomic<int64_t> next{0};
  parallel_for(threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = next++; i < items; i = next++) work(i, base + begin * stride);
  });
}

}  // namespace kdfast::cpu
