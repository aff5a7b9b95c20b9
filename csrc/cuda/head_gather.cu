// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

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

// The tensors of one launch: with the table of heads, less than the 4 KB of kernel arguments.
constexpr int kMaxParts = 32;

struct Part {
  const void* in;
  void* out;
  int64_t rows;       // destination runs: outer * dst_heads
  int64_t run;        // in units
  int32_t src_heads;  // heads in the source
  int32_t unit;       // bytes: 1, 2, 4, 8 or 16
};

struct Block {
  Part parts[kMaxParts];
  int32_t dst_heads;
  int16_t source[kMaxHeads];
};
static_assert(sizeof(Block) <= 4096, "kernel arguments of 4 KB are what every GPU takes");

template <typename Unit, typename Index>
__device__ __forceinline__ void move_part(const Part& p, const int16_t* source, int32_t dst_heads) {
  const auto* in = static_cast<const Unit*>(p.in);
  auto* out = static_cast<Unit*>(p.out);
  const auto run = static_cast<Index>(p.run), total = static_cast<Index>(p.rows) * run;
  const Index step = Index{gridDim.x} * blockDim.x;
  for (Index i = Index{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const Index from = source_run<Index>(source, i / run, static_cast<Index>(p.src_heads),
                                         static_cast<Index>(dst_heads));
    out[i] = in[from * run + i % run];
  }
}

// Row y of the grid moves tensor y; Index holds the units of every source and two steps of the
// grid.
template <typename Index>
__global__ void move_block(const __grid_constant__ Block block) {
  const Part& p = block.parts[blockIdx.y];
  switch (p.unit) {
    case 16: return move_part<uint4, Index>(p, block.source, block.dst_heads);
    case 8: return move_part<uint2, Index>(p, block.source, block.dst_heads);
    case 4: return move_part<uint32_t, Index>(p, block.source, block.dst_heads);
    case 2: return move_part<uint16_t, Index>(p, block.source, block.dst_heads);
    default: return move_part<uint8_t, Index>(p, block.source, block.dst_heads);
  }
}

void launch_block(const Block& block, int parts) {
  int64_t most = 0, largest = 0;
  for (int i = 0; i < parts; ++i) {
    const Part& p = block.parts[i];
    most = std::max(most, p.rows * p.run);
    largest = std::max(largest, p.rows / block.dst_heads * p.src_heads * p.run);
  }
  if (most == 0) return;
  const auto across = static_cast<unsigned>(std::min(kMaxBlocks, (most + kThreads - 1) / kThreads));
  const dim3 grid(across, static_cast<unsigned>(parts));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  // A step of the grid is 2^24 units at most, which a 32-bit index may go beyond its end.
  if (largest < int64_t{1} << 31)
    move_block<uint32_t><<<grid, kThreads, 0, stream>>>(block);
  else
    move_block<int64_t><<<grid, kThreads, 0, stream>>>(block);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// tensors[i] (..., heads * head_dim, ...) along dims[i], all on one device: kMaxParts a launch.
std::vector<at::Tensor> head_gather_block(at::TensorList tensors, at::IntArrayRef heads,
                                          int64_t head_dim, at::IntArrayRef dims) {
  TORCH_CHECK_VALUE(tensors.size() == dims.size() && !heads.empty(),
                    "head_gather_block: one dim a tensor, got ", dims.size(), " and ",
                    tensors.size());
  std::vector<at::Tensor> sources, results;
  if (tensors.empty()) return results;
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  Block block{};
  block.dst_heads = static_cast<int32_t>(heads.size());
  int used = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& x = tensors[i];
    TORCH_CHECK_VALUE(x.device() == tensors[0].device(), "head_gather_block: tensors are on ",
                      x.device(), " and ", tensors[0].device());
    check_heads(heads, count_heads(x, head_dim, dims[i]));
    // Kept until the launch: the caching allocator would hand its memory to the next one.
    const at::Tensor& in = sources.emplace_back(x.contiguous());
    at::Tensor& out = results.emplace_back(resized(x, dims[i], block.dst_heads * head_dim));
    const int64_t unit = unit_bytes(in, out, head_dim, dims[i]);
    HeadLayout m = head_layout(in, head_dim, dims[i], block.dst_heads, unit);
    map_gather(m, heads);
    std::copy_n(m.source, heads.size(), block.source);
    block.parts[used++] = {in.const_data_ptr(),   out.mutable_data_ptr(),
                           m.outer * m.dst_heads, m.run,
                           m.src_heads,           static_cast<int32_t>(unit)};
    if (used == kMaxParts || i + 1 == tensors.size()) {
      launch_block(block, used);
      used = 0;
    }
  }
  return results;
}

at::Tensor head_gather(const at::Tensor& x, at::IntArrayRef heads, int64_t head_dim, int64_t dim) {
  check_heads(heads, count_heads(x, head_dim, dim));
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = x.contiguous();
  at::Tensor out = resized(x, dim, static_cast<int64_t>(heads.size()) * head_dim);
  move(in, out, heads, head_dim, dim, false);
  return out;
}

at::Tensor head_gather_bwd(const at::Tensor& grad, at::IntArrayRef heads, int64_t head_dim,
                           int64_t dim, int64_t num_heads) {
  check_scatter(grad, heads, head_dim, dim, num_heads);
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
  m.impl("head_gather_block", &kdfast::cuda::head_gather_block);
  m.impl("head_gather_bwd", &kdfast::cuda::head_gather_bwd);
}
