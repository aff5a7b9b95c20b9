// SPDX-License-Identifier: Apache-2.0
// What the boundaries of kd_loss, feature_loss and swiglu_norm share.
#pragma once

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/element_of.h"
#include "tensor.h"

namespace kdfast::cpu {

// Elements that one thread should have at least: below this a second thread costs more than it
// saves.
constexpr int64_t kGrainElements = 1 << 14;

// A gradient of this size leaves the cache before anybody reads it.
constexpr size_t kStreamBytes = 8 << 20;

inline Type accumulator(const Tensor& x) { return x.type() == Type::f64 ? Type::f64 : Type::f32; }

// Asks for huge pages: the faults of a fresh 20 MB tensor in pages of 4 KiB cost more than its
// arithmetic. Only whole huge pages inside the tensor are named, and a refusal changes nothing.
inline void advise_huge(const Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + x.nbytes()) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// The gradient that waits for the backward pass: fp32 for fp16, since the loss scale comes later.
inline Tensor empty_gradient(const Tensor& x, bool need_grad) {
  const Ints none{0};
  const Sizes sizes = need_grad ? x.sizes() : Sizes(none);
  const Tensor grad = x.type() == Type::f16 ? empty(sizes, Type::f32) : empty_as(x, sizes);
  advise_huge(grad);
  return grad;
}

// (rows, size) view of (..., size) in which a row is contiguous; copies if there is none.
inline Tensor as_rows(const Tensor& x) {
  const int64_t size = x.size(-1), count = x.numel() / size;
  // The step from row to row, which has to be the same everywhere.
  int64_t step = size, run = 1;
  bool even = x.stride(x.dim() - 1) == 1 || size == 1;
  for (int64_t d = x.dim() - 2; d >= 0 && even; --d) {
    if (x.size(d) == 1) continue;
    if (run == 1) step = x.stride(d);
    even = x.stride(d) == step * run;
    run *= x.size(d);
  }
  const Tensor rows = even || count == 0 ? x : x.contiguous();
  return rows.as_strided(Ints{count, size}, Ints{even && count > 0 ? step : size, 1});
}

// fn(begin, end, scratch) over all rows, with `scratch` numbers of the accumulator per thread.
template <class F>
void for_rows(int64_t rows, int64_t size, int64_t scratch, Type accumulator, const F& fn) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / size);
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    const Tensor buffer = empty({scratch}, accumulator);
    fn(begin, end, buffer.mutable_data_ptr());
  });
}

// In the order of the rows, so the result does not depend on the number of threads.
inline double sum_rows(const Tensor& rows) {
  const double* p = rows.const_data_ptr<double>();
  double total = 0;
  for (int64_t r = 0; r < rows.numel(); ++r) total += p[r];
  return total;
}

}  // namespace kdfast::cpu
