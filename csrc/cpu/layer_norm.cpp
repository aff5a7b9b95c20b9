// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/layer_norm.h"

#include "cpu/kernels.h"
#include "cpu/row_loss.h"
#include "register.h"

namespace kdfast::cpu {
namespace {

// A second thread takes longer to wake up than the first needs for this many elements.
constexpr int64_t kAlone = 1 << 17;

void check(const char* name, const OptionalTensor& given, const Tensor& x) {
  if (!given) return;
  KDFAST_CHECK_VALUE(given->dim() == 1 && given->size(0) == x.size(-1) && given->is_contiguous() &&
                         (given->type() == x.type() || given->type() == accumulator(x)),
                     "layer_norm: ", name, " must be (C,) and contiguous, of the type of x ",
                     x.sizes(), " or of its sums, got ", given->sizes());
}

// x (..., C), weight and bias (C) of one type, or none -> (..., C). No gradient: for inference.
Tensor layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                  double eps) {
  KDFAST_CHECK_VALUE(x.dim() > 0 && x.size(-1) > 0, "layer_norm: x must be (..., C), C > 0, got ",
                     x.sizes());
  check("weight", weight, x);
  check("bias", bias, x);
  KDFAST_CHECK_VALUE(!weight || !bias || weight->type() == bias->type(),
                     "layer_norm: weight and bias must be of one type");
  KDFAST_CHECK_VALUE(eps >= 0, "layer_norm: eps must not be negative, got ", eps);
  const Tensor rows = as_rows(x), out = empty(x.sizes(), x.type());
  LayerNormArgs args{};
  args.elem = element_of("layer_norm", x);
  const OptionalTensor& typed = weight ? weight : bias;
  args.wide = typed && typed->type() == accumulator(x);
  args.x = rows.const_data_ptr();
  args.weight = weight ? weight->const_data_ptr() : nullptr;
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.channels = x.size(-1);
  args.stride = rows.stride(0);
  args.eps = eps;
  const auto fn = kernels().rows->layer_norm;
  const int64_t grain = std::max<int64_t>(1, kAlone / args.channels);
  parallel_for(rows.size(0), grain, [&](int64_t begin, int64_t end) { fn(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&kdfast::cpu::layer_norm));
}
