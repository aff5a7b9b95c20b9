// SPDX-License-Identifier: Apache-2.0
// How an op's arguments and results pass torch's stable interface. Included where ops are
// registered: STABLE_TORCH_LIBRARY_IMPL, with TORCH_BOX around each function.
#pragma once
#include <torch/csrc/stable/library.h>

#include "tensor.h"

template <>
struct torch::stable::detail::ToImpl<kdfast::Tensor> {
  static kdfast::Tensor call(StableIValue value, uint64_t, bool) {
    return kdfast::Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  }
};

template <>
struct torch::stable::detail::FromImpl<kdfast::Tensor> {
  static StableIValue call(const kdfast::Tensor& x, uint64_t, bool) {
    AtenTensorHandle handle = nullptr;
    kdfast::torch_did("return a tensor", aoti_torch_new_tensor_handle(x.handle(), &handle));
    return torch::stable::detail::from(handle);
  }
};
