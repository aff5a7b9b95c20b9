// SPDX-License-Identifier: Apache-2.0

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <vector>

#include "head_gather.h"
#include "head_layout.h"
#include "register.h"

namespace kdfast::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// torch's stream of the device that is set.
cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  torch_did("name its stream", aoti_torch_get_current_cuda_stream(x.device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

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
void launch(const HeadLayout& m, const Tensor& src, const Tensor& dst) {
  const int64_t total = m.outer * m.dst_heads * m.run;
  if (total == 0) return;
  const auto blocks = std::min(kMaxBlocks, (total + kThreads - 1) / kThreads);
  move_units<Unit><<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(src)>>>(
      m, static_cast<const Unit*>(src.const_data_ptr()),
      static_cast<Unit*>(dst.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Largest unit (1, 2, 4, 8 or 16 bytes) that divides a run and both addresses.
int64_t unit_bytes(const Tensor& src, const Tensor& dst, int64_t head_dim, int64_t dim) {
  const int64_t run = head_layout(src, head_dim, dim, 1, 1).run;
  const auto bits = static_cast<uint64_t>(run) | reinterpret_cast<uintptr_t>(src.const_data_ptr()) |
                    reinterpret_cast<uintptr_t>(dst.const_data_ptr()) | 16u;
  return static_cast<int64_t>(bits & (~bits + 1));
}

void move(const Tensor& src, const Tensor& dst, const Ints& heads, int64_t head_dim, int64_t dim,
          bool scatter) {
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

void launch_block(const Block& block, int parts, cudaStream_t stream) {
  int64_t most = 0, largest = 0;
  for (int i = 0; i < parts; ++i) {
    const Part& p = block.parts[i];
    most = std::max(most, p.rows * p.run);
    largest = std::max(largest, p.rows / block.dst_heads * p.src_heads * p.run);
  }
  if (most == 0) return;
  const auto across = static_cast<unsigned>(std::min(kMaxBlocks, (most + kThreads - 1) / kThreads));
  const dim3 grid(across, static_cast<unsigned>(parts));
  // A step of the grid is 2^24 units at most, which a 32-bit index may go beyond its end.
  if (largest < int64_t{1} << 31)
    move_block<uint32_t><<<grid, kThreads, 0, stream>>>(block);
  else
    move_block<int64_t><<<grid, kThreads, 0, stream>>>(block);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// tensors[i] (..., heads * head_dim, ...) along dims[i], all on one device: kMaxParts a launch.
std::vector<Tensor> head_gather_block(const std::vector<Tensor>& tensors, const Ints& heads,
                                      int64_t head_dim, const Ints& dims) {
  KDFAST_CHECK_VALUE(tensors.size() == dims.size() && !heads.empty(),
                     "head_gather_block: one dim a tensor, got ", dims.size(), " and ",
                     tensors.size());
  std::vector<Tensor> sources, results;
  if (tensors.empty()) return results;
  const DeviceGuard guard(tensors[0].device_index());
  const cudaStream_t stream = current_stream(tensors[0]);
  Block block{};
  block.dst_heads = static_cast<int32_t>(heads.size());
  int used = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    KDFAST_CHECK_VALUE(x.device_index() == tensors[0].device_index(),
                       "head_gather_block: tensors are on CUDA devices ", x.device_index(), " and ",
                       tensors[0].device_index());
    check_heads(heads, count_heads(x, head_dim, dims[i]));
    // Kept until the launch: the caching allocator would hand its memory to the next one.
    const Tensor& in = sources.emplace_back(x.contiguous());
    const Tensor& out = results.emplace_back(resized(x, dims[i], block.dst_heads * head_dim));
    const int64_t unit = unit_bytes(in, out, head_dim, dims[i]);
    HeadLayout m = head_layout(in, head_dim, dims[i], block.dst_heads, unit);
    map_gather(m, heads);
    std::copy_n(m.source, heads.size(), block.source);
    block.parts[used++] = {in.const_data_ptr(),   out.mutable_data_ptr(),
                           m.outer * m.dst_heads, m.run,
                           m.src_heads,           static_cast<int32_t>(unit)};
    if (used == kMaxParts || i + 1 == tensors.size()) {
      launch_block(block, used, stream);
      used = 0;
    }
  }
  return results;
}

Tensor head_gather(const Tensor& x, const Ints& heads, int64_t head_dim, int64_t dim) {
  check_heads(heads, count_heads(x, head_dim, dim));
  const DeviceGuard guard(x.device_index());
  const Tensor in = x.contiguous();
  const Tensor out = resized(x, dim, static_cast<int64_t>(heads.size()) * head_dim);
  move(in, out, heads, head_dim, dim, false);
  return out;
}

Tensor head_gather_bwd(const Tensor& grad, const Ints& heads, int64_t head_dim, int64_t dim,
                       int64_t num_heads) {
  check_scatter(grad, heads, head_dim, dim, num_heads);
  const DeviceGuard guard(grad.device_index());
  const Tensor in = grad.contiguous();
  const Tensor out = resized(grad, dim, num_heads * head_dim);
  move(in, out, heads, head_dim, dim, true);
  return out;
}

}  // namespace
}  // namespace kdfast::cuda

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("head_gather", TORCH_BOX(&kdfast::cuda::head_gather));
  m.impl("head_gather_block", TORCH_BOX(&kdfast::cuda::head_gather_block));
  m.impl("head_gather_bwd", TORCH_BOX(&kdfast::cuda::head_gather_bwd));
}
