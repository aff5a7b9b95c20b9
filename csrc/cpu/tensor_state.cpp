// SPDX-License-Identifier: Apache-2.0
// Whether tensors changed since they were last asked, without reading all of them.

#include <cstdint>
#include <cstring>

#include "register.h"

namespace kdfast::cpu {
namespace {

constexpr uint64_t kSamples = 64;
// The golden ratio's fraction of 2^32: its multiples fall evenly, so into all rows and columns of a
// matrix, whatever its width.
constexpr uint64_t kGolden = 2654435769;

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 29);
}

// Of the bytes of 64 elements. They are for edits that torch's version counter does not see:
// through `.data`, or through an array that shares the memory.
uint64_t samples(const Tensor& x, uint64_t hash) {
  const auto* bytes = static_cast<const char*>(x.const_data_ptr());
  const uint64_t count = x.numel(), size = x.element_size();
  for (uint64_t i = 0; i < kSamples && count > 0; ++i) {
    const uint64_t turn = (i * kGolden) & 0xFFFFFFFF;
    // The upper and the lower half of count apart: their product with turn would not fit.
    const uint64_t place = (count >> 32) * turn + (((count & 0xFFFFFFFF) * turn) >> 32);
    uint64_t value = 0;
    std::memcpy(&value, bytes + place * size, size < 8 ? size : 8);
    // A sum of what each gives alone: the processor need not wait for one to begin the next.
    hash += mix(i + 1, value);
  }
  return hash;
}

// A number that differs when a tensor is another one, was written to, or got other elements.
// `versions` are what torch counts of them, which its stable interface does not tell.
int64_t tensor_state(const std::vector<Tensor>& tensors, const Ints& versions) {
  KDFAST_CHECK_VALUE(versions.size() == tensors.size(), "tensor_state: one version a tensor, got ",
                     versions.size(), " for ", tensors.size());
  uint64_t hash = tensors.size();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    KDFAST_CHECK_VALUE(x.is_dense(), "tensor_state: tensors must be dense, got one of size ",
                       x.sizes(), " and strides ", x.strides());
    hash = mix(hash, reinterpret_cast<uintptr_t>(x.const_data_ptr()));
    hash = mix(hash, static_cast<uint64_t>(x.torch_type()));
    hash = mix(hash, versions[i]);
    for (const int64_t size : x.sizes()) hash = mix(hash, size);
    for (const int64_t stride : x.strides()) hash = mix(hash, stride);
    hash = samples(x, hash);
  }
  return static_cast<int64_t>(hash);
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("tensor_state", TORCH_BOX(&kdfast::cpu::tensor_state));
}
