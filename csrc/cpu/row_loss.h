// SPDX-License-Identifier: Apache-2.0
// What the boundaries of kd_loss, feature_loss and swiglu_norm share.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/element_of.h"

namespace kdfast::cpu {

// Elements that one thread should have at least: below this a second thread costs more than it
// saves.
constexpr int64_t kGrainElements = 1 << 14;

// A gradient of this size leaves the cache before anybody reads it.
constexpr size_t kStreamBytes = 8 << 20;

inline at::ScalarType accumulator(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Asks for huge pages: the faults of a fresh 20 MB tensor in pages of 4 KiB cost more than its
// arithmetic. Only whole huge pages inside the tensor are named, and a refusal changes nothing.
inline void advise_huge(const at::Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + x.nbytes()) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// The gradient that waits for the backward pass: fp32 for fp16, since the loss scale comes later.
inline at::Tensor empty_gradient(const at::Tensor& x, bool need_grad) {
  const auto type = x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
  const auto options = x.options().dtype(type);
  if (!need_grad) return at::empty({0}, options);
  const at::Tensor grad = at::empty(x.sizes(), options);
  advise_huge(grad);
  return grad;
}

// (rows, size) view of (..., size) in which a row is contiguous; copies if there is none.
inline at::Tensor as_rows(const at::Tensor& x) {
  const int64_t size = x.size(-1);
  const at::Tensor rows = x.reshape({x.numel() / size, size});
  return rows.stride(1) == 1 || size == 1 ? rows : rows.contiguous();
}

// fn(begin, end, scratch) over all rows, with `scratch` numbers of the accumulator per thread.
template <class F>
void for_rows(int64_t rows, int64_t size, int64_t scratch, at::ScalarType accumulator,
              const F& fn) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / size);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const at::Tensor buffer = at::empty({scratch}, at::dtype(accumulator));
    fn(begin, end, buffer.mutable_data_ptr());
  });
}

// The scalar result x, which may be more than its type holds.
inline at::Tensor scalar_result(double x, const at::TensorOptions& options) {
  const bool wide = options.dtype().toScalarType() == at::kDouble;
  return at::full({}, wide ? x : static_cast<double>(static_cast<float>(x)), options);
}

// In the order of the rows, so the result does not depend on the number of threads.
inline double sum_rows(const at::Tensor& rows) {
  const double* p = rows.const_data_ptr<double>();
  double total = 0;
  for (int64_t r = 0; r < rows.numel(); ++r) total += p[r];
  return total;
}

}  // namespace kdfast::cpu
