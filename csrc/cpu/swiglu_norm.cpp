// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/swiglu_norm.h"

#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/row_loss.h"
#include "register.h"

namespace kdfast::cpu {
namespace {

// Rows whose gradients by weight and bias are added up together: a matter of the shape alone, so
// that the sums do not depend on the number of threads.
int64_t rows_together(int64_t rows) { return std::clamp<int64_t>(rows / 64, 16, 256); }

void check(const Tensor& gate, const Tensor& value, const Tensor& weight) {
  KDFAST_CHECK_VALUE(gate.dim() > 0 && gate.size(-1) > 0 && same_sizes(gate, value) &&
                         gate.type() == value.type() && weight.dim() == 1 && weight.size(0) > 0 &&
                         weight.size(0) <= gate.size(-1),
                     "swiglu_norm: gate and value must be alike and weight must fit, got ",
                     gate.sizes(), ", ", value.sizes(), " and ", weight.sizes());
}

SwigluNormArgs inputs(const Tensor& gate, const Tensor& g, const Tensor& v, const Tensor& weight) {
  SwigluNormArgs args{};
  args.elem = element_of("swiglu_norm", gate);
  args.gate = g.const_data_ptr();
  args.value = v.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.width = gate.size(-1);
  args.channels = weight.size(0);
  args.gate_stride = g.stride(0);
  args.value_stride = v.stride(0);
  args.streamed = gate.nbytes() >= kStreamBytes;
  return args;
}

Tensor empty_result(const Tensor& like) {
  const Tensor out = empty_as(like, like.sizes());
  advise_huge(out);
  return out;
}

// gate, value (..., P), weight, bias (C), C <= P -> out (..., P), mean and rstd (...) of the
// products.
std::tuple<Tensor, Tensor, Tensor> swiglu_norm(const Tensor& gate, const Tensor& value,
                                               const Tensor& weight, const Tensor& bias,
                                               double eps) {
  check(gate, value, weight);
  check(gate, value, bias);
  KDFAST_CHECK_VALUE(same_sizes(bias, weight), "swiglu_norm: bias must be like weight, got ",
                     bias.sizes());
  KDFAST_CHECK_VALUE(eps >= 0, "swiglu_norm: eps must not be negative, got ", eps);
  const auto wide = accumulator(gate);
  const Tensor g = as_rows(gate), v = as_rows(value);
  const Tensor w = weight.to(wide).contiguous(), b = bias.to(wide).contiguous();
  const Tensor out = empty_result(gate);
  const Sizes rows = gate.sizes().first(gate.dim() - 1);
  const Tensor mean = empty(rows, wide), rstd = empty(rows, wide);
  SwigluNormArgs args = inputs(gate, g, v, w);
  args.bias = b.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  args.eps = eps;
  const auto fn = kernels().rows->swiglu_norm;
  for_rows(g.size(0), args.channels, args.channels, wide,
           [&](int64_t begin, int64_t end, void* scratch) { fn(args, begin, end, scratch); });
  return {out, mean, rstd};
}

// sums (blocks, 2, size) of the accumulator, added up in the order of the blocks.
template <class A>
void add_blocks(const Tensor& sums, const Tensor& first, const Tensor& second) {
  const int64_t blocks = sums.size(0), size = sums.size(2);
  const A* p = sums.const_data_ptr<A>();
  std::vector<double> total(2 * size);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < 2 * size; ++i) total[i] += p[b * 2 * size + i];
  }
  std::copy_n(total.begin(), size, first.mutable_data_ptr<A>());
  std::copy_n(total.begin() + size, size, second.mutable_data_ptr<A>());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_norm_bwd(const Tensor& grad, const Tensor& gate,
                                                           const Tensor& value,
                                                           const Tensor& weight, const Tensor& mean,
                                                           const Tensor& rstd) {
  check(gate, value, weight);
  check(gate, grad, weight);
  const auto wide = accumulator(gate);
  const Tensor g = as_rows(gate), v = as_rows(value), d = as_rows(grad);
  const int64_t rows = g.size(0);
  KDFAST_CHECK_VALUE(mean.numel() == rows && rstd.numel() == rows && mean.is_contiguous() &&
                         rstd.is_contiguous() && mean.type() == wide && rstd.type() == wide,
                     "swiglu_norm: mean and rstd must be the forward's, got ", mean.sizes());
  const Tensor w = weight.to(wide).contiguous();
  const Tensor dgate = empty_result(gate), dvalue = empty_result(gate);
  const Tensor dweight = empty(w.sizes(), wide), dbias = empty(w.sizes(), wide);
  SwigluNormArgs args = inputs(gate, g, v, w);
  args.grad = d.const_data_ptr();
  args.grad_stride = d.stride(0);
  args.dgate = dgate.mutable_data_ptr();
  args.dvalue = dvalue.mutable_data_ptr();
  args.mean = const_cast<void*>(mean.const_data_ptr());
  args.rstd = const_cast<void*>(rstd.const_data_ptr());

  const int64_t together = rows_together(rows), blocks = (rows + together - 1) / together;
  const Tensor sums = empty({blocks, 2, args.channels}, wide);
  char* p = static_cast<char*>(sums.mutable_data_ptr());
  const size_t block_bytes = 2 * args.channels * sums.element_size();
  const auto fn = kernels().rows->swiglu_norm_bwd;
  for_rows(blocks, together * args.channels, args.channels, wide,
           [&](int64_t begin, int64_t end, void* scratch) {
             for (int64_t b = begin; b < end; ++b) {
               fn(args, b * together, std::min(rows, (b + 1) * together), scratch,
                  p + b * block_bytes);
             }
           });
  const auto add = wide == Type::f64 ? add_blocks<double> : add_blocks<float>;
  add(sums, dweight, dbias);
  return {dgate, dvalue, dweight.to_type_of(weight), dbias.to_type_of(weight)};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("swiglu_norm", TORCH_BOX(&kdfast::cpu::swiglu_norm));
  m.impl("swiglu_norm_bwd", TORCH_BOX(&kdfast::cpu::swiglu_norm_bwd));
}
