// SPDX-License-Identifier: Apache-2.0
#include <tuple>

#include "cpu/isa/transpose.h"
#include "cpu/kernels.h"
#include "cpu/row_loss.h"
#include "register.h"

namespace kdfast::cpu {
namespace {

// x (R, C) of fp32 -> its transpose (C, R), contiguous, and the sums (C) of its columns, empty if
// they are not wanted. No gradient: it is part of one.
std::tuple<Tensor, Tensor> transpose_sum(const Tensor& x, bool sums) {
  KDFAST_CHECK_VALUE(x.dim() == 2 && x.type() == Type::f32,
                     "transpose_sum: x must be (R, C) of fp32, got ", x.sizes(), " of ",
                     x.type_name());
  const int64_t rows = x.size(0), columns = x.size(1);
  const Tensor out = empty({columns, rows}, Type::f32);
  const Tensor total = sums ? zeros(Ints{columns}, Type::f32) : empty({0}, Type::f32);
  if (x.numel() == 0) return {out, total};
  advise_huge(out);
  const Tensor tall = x.stride(1) == 1 || columns == 1 ? x : x.contiguous();
  const TransposeArgs args{tall.const_data_ptr<float>(),
                           out.mutable_data_ptr<float>(),
                           sums ? total.mutable_data_ptr<float>() : nullptr,
                           rows,
                           columns,
                           tall.stride(0)};
  const auto fn = kernels().rows->transpose;
  const int64_t strips = (columns + kTransposeStrip - 1) / kTransposeStrip;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (rows * kTransposeStrip));
  parallel_for(strips, grain, [&](int64_t begin, int64_t end) { fn(args, begin, end); });
  return {out, total};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("transpose_sum", TORCH_BOX(&kdfast::cpu::transpose_sum));
}
