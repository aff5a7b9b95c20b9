// SPDX-License-Identifier: Apache-2.0
// Integer arithmetic on sizes that come from a caller, which may be anything.
#pragma once
#include <c10/util/Exception.h>
#include <c10/util/safe_numerics.h>

#include <cstdint>
#include <initializer_list>

namespace kdfast {

// The product of sizes; a ValueError where int64 cannot hold it.
inline int64_t product_of(const char* op, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    TORCH_CHECK_VALUE(!c10::mul_overflows(product, size, &product), op,
                      ": sizes must have a product below 2^63, got ",
                      at::IntArrayRef(sizes.begin(), sizes.size()));
  return product;
}

// Whether a * b is `want`, in arithmetic that does not wrap around.
inline bool product_is(int64_t a, int64_t b, int64_t want) {
  int64_t product = 0;
  return !c10::mul_overflows(a, b, &product) && product == want;
}

}  // namespace kdfast
