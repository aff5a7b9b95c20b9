// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "head_gather.h"
#include "head_layout.h"

namespace kdfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // the grid-stride loop covers the rest

// One thread moves one unit of 1 to 16 bytes; neighbours move neighbouring units.
template <typename Unit>
__global__ void move_units(const __grid_constant__ HeadLayout m, const Unit* __restrict__ in,
                           Unit* __restrict__ out) {
  const int64_t total = m.outer * m.dst_heads * m.run;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t from = source_offset(m, i / m.run);
    out[i] = from < 0 ? Unit{} : in[from + i % m.run];
  }
}

template <typename Unit>
void launch(const HeadLayout& m, const at::Tensor& src, at::Tensor& dst) {
  const int64_t total = m.outer * m.dst_heads * m.run;
  if (total == 0) return;
  const auto blocks = std::min(kMaxBlocks, (total + kThreads - 1) / kThreads);
  move_units<Unit>
      <<<static_cast<unsigned>(blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
          m, static_cast<const Unit*>(src.const_data_ptr()),
          static_cast<Unit*>(dst.mutable_data_ptr()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Largest unit (1, 2, 4, 8 or 16 bytes) that divides a run and both addresses.
int64_t unit_bytes(const at::Tensor& src, const at::Tensor& dst, int64_t head_dim, int64_t dim) {
  const int64_t run = head_layout(src, head_dim, dim, 1, 1).run;
  const auto bits = static_cast<uint64_t>(run) | reinterpret_cast<uintptr_t>(src.const_data_ptr()) |
                    reinterpret_cast<uintptr_t>(dst.const_data_ptr()) | 16u;
  return static_cast<int64_t>(bits & (~bits + 1));
}

void move(const at::Tensor& src, at::Tensor& dst, at::IntArrayRef heads, int64_t head_dim,
          int64_t dim, bool scatter) {
  const int64_t unit = unit_bytes(src, dst, head_dim, dim);
  HeadLayout m = head_layout(src, head_dim, dim, dst.size(dim) / head_dim, unit);
  scatter ? map_scatter(m, heads) : map_gather(m, heads);
  switch (unit) {
    case 16: return launch<uint4>(m, src, dst);
    case 8: return launch<uint2>(m, src, dst);
    case 4: return launch<uint32_t>(m, src, dst);
    case 2: return launch<uint16_t>(m, src, dst);
    default: return launch<uint8_t>(m, src, dst);
  }
}

at::Tensor head_gather(const at::Tensor& x, at::IntArrayRef heads, int64_t head_dim, int64_t dim) {
  check_args(x, heads, head_dim, dim, x.size(dim) / head_dim);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = x.contiguous();
  at::Tensor out = resized(x, dim, static_cast<int64_t>(heads.size()) * head_dim);
  move(in, out, heads, head_dim, dim, false);
  return out;
}

at::Tensor head_gather_bwd(const at::Tensor& grad, at::IntArrayRef heads, int64_t head_dim,
                           int64_t dim, int64_t num_heads) {
  check_args(grad, heads, head_dim, dim, num_heads);
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor in = grad.contiguous();
  at::Tensor out = resized(grad, dim, num_heads * head_dim);
  move(in, out, heads, head_dim, dim, true);
  return out;
}

}  // namespace
}  // namespace kdfast::cuda

TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("head_gather", &kdfast::cuda::head_gather);
  m.impl("head_gather_bwd", &kdfast::cuda::head_gather_bwd);
}
