// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels.h"
#include "errors.h"

namespace kdfast::cpu {

// What the products of an attention call are made of, by the element type of what is multiplied.
// `fp32` is what those of fp32 may be: the caller knows torch's setting, which has no place in its
// stable interface. See products_of_fp32 in kdfast/ops/_matmul.py.
inline Products products_of(Element element, Products fp32) {
  if (element == Element::bf16) return Products::bf16;
  // In one bf16 it would lose three bits; in two it loses none.
  if (element == Element::f16) return Products::split;
  return fp32;
}

// The argument of an op.
inline Products checked_products(const char* op, int64_t products) {
  KDFAST_CHECK_VALUE(products >= 0 && products <= static_cast<int64_t>(Products::bf16), op,
                     ": products must be 0, 1 or 2, got ", products);
  return static_cast<Products>(products);
}

// The kernels with sums of type A over such products; of double there is one kind.
template <class A>
const AttentionKernels<A>& attention_kernels([[maybe_unused]] Products products) {
  if constexpr (sizeof(A) == sizeof(double))
    return attention_f64;
  else
    return *kernels().attention[static_cast<int>(products)];
}

}  // namespace kdfast::cpu
