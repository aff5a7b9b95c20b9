// SPDX-License-Identifier: Apache-2.0
// Tensors by torch's stable C interface: one build runs under every torch from 2.10 on. It needs no
// class of ATen and no operator that is found by its name, which takes microseconds.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "errors.h"

namespace kdfast {

// The types that kernels know. `other` can be moved and copied, not computed with, and a new tensor
// has it only as another one does.
enum class Type { f64, f32, bf16, f16, i64, u8, other };

// That of the numbers A which sums are made of.
template <class A>
constexpr Type type_of = std::is_same_v<A, double> ? Type::f64 : Type::f32;

// Throws RuntimeError for a call of torch that failed; torch has written the reason to stderr.
void torch_did(const char* what, AOTITorchError code);

// A strided tensor, or none (not defined). What describes it is read once: kernels ask for it
// often, and an answer of torch takes longer than a load.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned);

  bool defined() const { return handle_ != nullptr; }
  AtenTensorHandle handle() const { return handle_.get(); }

  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d < 0 ? d + dim_ : d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  Sizes sizes() const { return {sizes_, static_cast<size_t>(dim_)}; }
  Sizes strides() const { return {strides_, static_cast<size_t>(dim_)}; }
  int64_t numel() const { return numel_; }
  bool is_contiguous() const;
  // Whether the elements fill a piece of memory, each in a place of its own.
  bool is_dense() const;

  Type type() const { return type_; }
  const char* type_name() const;
  int32_t torch_type() const { return torch_type_; }
  int64_t element_size() const { return element_size_; }
  size_t nbytes() const { return numel_ * element_size_; }
  int32_t device_type() const;
  int32_t device_index() const;

  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const;
  template <class T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(data_);
  }
  template <class T>
  T* mutable_data_ptr() const {
    return static_cast<T*>(mutable_data_ptr());
  }

  // These return the tensor itself where it is so already.
  Tensor to(Type type) const;
  Tensor to_type_of(const Tensor& like) const;
  Tensor contiguous() const;
  // A view of the same memory.
  Tensor as_strided(Sizes sizes, Sizes strides, int64_t offset = 0) const;
  // All elements, of any strides; a factor that is not finite makes them NaN.
  const Tensor& zero_() const;
  const Tensor& fill_nan_() const;

 private:
  std::shared_ptr<AtenTensorOpaque> handle_;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;
  const void* data_ = nullptr;
  int64_t dim_ = 0, numel_ = 0, element_size_ = 0;
  int32_t torch_type_ = 0;
  Type type_ = Type::other;
};

using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using OptionalInts = std::optional<Ints>;

inline bool same(Sizes a, Sizes b) { return std::ranges::equal(a, b); }
inline bool same_sizes(const Tensor& a, const Tensor& b) { return same(a.sizes(), b.sizes()); }

// Strides of contiguous elements.
Ints ordered_strides(Sizes sizes);

// New tensors on the CPU; contiguous without strides.
Tensor empty(Sizes sizes, Type type);
Tensor zeros(Sizes sizes, Type type);
// A number as f64 or f32, of which it may be more than the type holds.
Tensor scalar_result(double x, Type type);
// The same of the type and on the device of another tensor.
Tensor empty_as(const Tensor& like, Sizes sizes);
Tensor empty_as(const Tensor& like, Sizes sizes, Sizes strides);
Tensor zeros_as(const Tensor& like, Sizes sizes);

inline Tensor empty(std::initializer_list<int64_t> sizes, Type type) {
  return empty(Sizes(sizes.begin(), sizes.size()), type);
}
inline Tensor empty_as(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_as(like, Sizes(sizes.begin(), sizes.size()));
}
inline Tensor zeros_as(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return zeros_as(like, Sizes(sizes.begin(), sizes.size()));
}

// fn(begin, end) for parts of [0, count) of `grain` at least, on torch's threads.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& fn) {
  const auto call = [](int64_t begin, int64_t end, void* f) {
    (*static_cast<const F*>(f))(begin, end);
  };
  torch_did("run threads",
            torch_parallel_for(0, count, grain, call, const_cast<F*>(std::addressof(fn))));
}

inline int64_t num_threads() {
  uint32_t threads = 1;
  torch_did("count threads", torch_get_num_threads(&threads));
  return threads;
}

}  // namespace kdfast
