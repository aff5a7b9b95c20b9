// SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <limits>
#include <numeric>
#include <stdexcept>

namespace kdfast {
namespace {

// torch's numbers of the types, which are its own affair.
struct Codes {
  int32_t of[static_cast<int>(Type::other)] = {
      aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
      aoti_torch_dtype_float16(), aoti_torch_dtype_int64(),   aoti_torch_dtype_uint8()};
};

const Codes& codes() {
  static const Codes codes;
  return codes;
}

Type type_of_code(int32_t code) {
  const auto& all = codes().of;
  return static_cast<Type>(std::find(std::begin(all), std::end(all), code) - std::begin(all));
}

int32_t code_of(Type type) {
  if (type == Type::other) throw std::logic_error("kdfast: a tensor of no certain type");
  return codes().of[static_cast<int>(type)];
}

Tensor make(Sizes sizes, Sizes strides, int32_t code, int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               code, device_type, device_index, &handle) != AOTI_TORCH_SUCCESS)
    // The text by which an error is known to be about memory.
    throw std::runtime_error(text("kdfast: can't allocate memory for a tensor of size ", sizes,
                                  " and ", aoti_torch_dtype_element_size(code),
                                  " bytes an element"));
  return Tensor(handle);
}

Tensor copy_of(const Tensor& x, int32_t code) {
  const Tensor out =
      make(x.sizes(), ordered_strides(x.sizes()), code, x.device_type(), x.device_index());
  torch_did("copy a tensor", aoti_torch_copy_(out.handle(), x.handle(), 0));
  return out;
}

}  // namespace

Ints ordered_strides(Sizes sizes) {
  Ints strides(sizes.size());
  // Unsigned, for the sizes of an empty tensor may have any product. A dimension without elements
  // counts as one of one, as torch has it.
  uint64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= std::max<int64_t>(1, sizes[d]))
    strides[d] = static_cast<int64_t>(step);
  return strides;
}

void torch_did(const char* what, AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(text("kdfast: torch could not ", what));
}

Tensor::Tensor(AtenTensorHandle owned)
    : handle_(owned, [](AtenTensorHandle handle) { aoti_torch_delete_tensor_object(handle); }) {
  int64_t *sizes = nullptr, *strides = nullptr;
  torch_did("tell a tensor's sizes", aoti_torch_get_sizes(owned, &sizes));
  torch_did("tell a tensor's strides", aoti_torch_get_strides(owned, &strides));
  torch_did("tell a tensor's dimensions", aoti_torch_get_dim(owned, &dim_));
  torch_did("count a tensor's elements", aoti_torch_get_numel(owned, &numel_));
  torch_did("tell a tensor's type", aoti_torch_get_dtype(owned, &torch_type_));
  torch_did("tell where a tensor lies", torch_get_const_data_ptr(owned, &data_));
  sizes_ = sizes;
  strides_ = strides;
  type_ = type_of_code(torch_type_);
  element_size_ = static_cast<int64_t>(aoti_torch_dtype_element_size(torch_type_));
}

bool Tensor::is_contiguous() const {
  bool result = false;
  torch_did("tell a tensor's order", aoti_torch_is_contiguous(handle(), &result));
  return result;
}

bool Tensor::is_dense() const {
  std::vector<int64_t> order(dim_);
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, {}, [&](int64_t d) { return size(d) < 2 ? INT64_MAX : stride(d); });
  int64_t step = 1;
  for (const int64_t d : order) {
    if (size(d) < 2) break;
    if (stride(d) != step) return false;
    step *= size(d);
  }
  return true;
}

const char* Tensor::type_name() const {
  using torch::headeronly::ScalarType;
  return torch::headeronly::toString(
      torch::stable::detail::to<ScalarType>(torch::stable::detail::from(torch_type_)));
}

int32_t Tensor::device_type() const {
  int32_t type = 0;
  torch_did("tell a tensor's device", aoti_torch_get_device_type(handle(), &type));
  return type;
}

int32_t Tensor::device_index() const {
  int32_t index = 0;
  torch_did("tell a tensor's device", aoti_torch_get_device_index(handle(), &index));
  return index;
}

void* Tensor::mutable_data_ptr() const {
  void* data = nullptr;
  torch_did("tell where a tensor lies", torch_get_mutable_data_ptr(handle(), &data));
  return data;
}

Tensor Tensor::to(Type type) const { return type == type_ ? *this : copy_of(*this, code_of(type)); }

Tensor Tensor::to_type_of(const Tensor& like) const {
  return like.torch_type_ == torch_type_ ? *this : copy_of(*this, like.torch_type_);
}

Tensor Tensor::contiguous() const { return is_contiguous() ? *this : copy_of(*this, torch_type_); }

Tensor Tensor::as_strided(Sizes sizes, Sizes strides, int64_t offset) const {
  AtenTensorHandle view = nullptr;
  torch_did("make a view",
            aoti_torch__reinterpret_tensor(handle(), static_cast<int64_t>(sizes.size()),
                                           sizes.data(), strides.data(), offset, &view));
  return Tensor(view);
}

const Tensor& Tensor::zero_() const {
  torch_did("clear a tensor", aoti_torch_zero_(handle()));
  return *this;
}

const Tensor& Tensor::fill_nan_() const {
  const Tensor nan = empty({}, Type::f64);
  *nan.mutable_data_ptr<double>() = std::numeric_limits<double>::quiet_NaN();
  torch_did("fill a tensor", aoti_torch_copy_(handle(), nan.handle(), 0));
  return *this;
}

Tensor empty(Sizes sizes, Type type) {
  return make(sizes, ordered_strides(sizes), code_of(type), aoti_torch_device_type_cpu(), 0);
}

Tensor zeros(Sizes sizes, Type type) { return empty(sizes, type).zero_(); }

Tensor scalar_result(double x, Type type) {
  const Tensor result = empty({}, type);
  if (type == Type::f64)
    *result.mutable_data_ptr<double>() = x;
  else
    *result.mutable_data_ptr<float>() = static_cast<float>(x);
  return result;
}

Tensor empty_as(const Tensor& like, Sizes sizes) {
  return empty_as(like, sizes, ordered_strides(sizes));
}

Tensor empty_as(const Tensor& like, Sizes sizes, Sizes strides) {
  return make(sizes, strides, like.torch_type(), like.device_type(), like.device_index());
}

Tensor zeros_as(const Tensor& like, Sizes sizes) { return empty_as(like, sizes).zero_(); }

}  // namespace kdfast
