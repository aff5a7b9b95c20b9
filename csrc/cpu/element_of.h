// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/core/Tensor.h>

#include "cpu/isa/elements.h"

namespace kdfast::cpu {

// The tag by which a kernel in isa/ learns the element type of x; a TypeError for other types.
inline Element element_of(const char* op, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return Element::f64;
    case at::kFloat: return Element::f32;
    case at::kBFloat16: return Element::bf16;
    case at::kHalf: return Element::f16;
    default: TORCH_CHECK_TYPE(false, op, ": must be floating, got ", x.scalar_type());
  }
}

}  // namespace kdfast::cpu
