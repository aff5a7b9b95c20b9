// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/isa/elements.h"
#include "tensor.h"

namespace kdfast::cpu {

// The tag by which a kernel in isa/ learns the element type of x; a TypeError for other types.
inline Element element_of(const char* op, const Tensor& x) {
  switch (x.type()) {
    case Type::f64: return Element::f64;
    case Type::f32: return Element::f32;
    case Type::bf16: return Element::bf16;
    case Type::f16: return Element::f16;
    default: throw_type_error(text(op, ": must be floating, got ", x.type_name()));
  }
}

}  // namespace kdfast::cpu
