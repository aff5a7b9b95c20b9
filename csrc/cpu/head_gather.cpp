// SPDX-License-Identifier: Apache-2.0
#include "head_gather.h"

#include <algorithm>
#include <cstring>

#include "head_layout.h"
#include "register.h"

namespace kdfast::cpu {
namespace {

// Bytes that one thread should move at least: below this a second thread costs more than it saves.
constexpr int64_t kGrainBytes = 1 << 21;

void move_runs(const HeadLayout& m, const Tensor& src, const Tensor& dst) {
  const char* in = static_cast<const char*>(src.const_data_ptr());
  char* out = static_cast<char*>(dst.mutable_data_ptr());
  const int64_t rows = m.outer * m.dst_heads;
  if (rows == 0 || m.run == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / m.run);
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    // A division per run takes as long as a short run itself.
    int64_t head = begin % m.dst_heads;
    const char* block = in + begin / m.dst_heads * m.src_heads * m.run;
    for (char* to = out + begin * m.run; to != out + end * m.run; to += m.run) {
      const int64_t from = m.source[head];
      // memcpy and memset of a run are the C library's widest moves for this CPU.
      if (from < 0)
        std::memset(to, 0, m.run);
      else
        std::memcpy(to, block + from * m.run, m.run);
      if (++head == m.dst_heads) {
        head = 0;
        block += m.src_heads * m.run;
      }
    }
  });
}

Tensor head_gather(const Tensor& x, const Ints& heads, int64_t head_dim, int64_t dim) {
  check_heads(heads, count_heads(x, head_dim, dim));
  const Tensor in = x.contiguous();
  const Tensor out = resized(x, dim, static_cast<int64_t>(heads.size()) * head_dim);
  HeadLayout m = head_layout(in, head_dim, dim, static_cast<int64_t>(heads.size()), 1);
  map_gather(m, heads);
  move_runs(m, in, out);
  return out;
}

Tensor head_gather_bwd(const Tensor& grad, const Ints& heads, int64_t head_dim, int64_t dim,
                       int64_t num_heads) {
  check_scatter(grad, heads, head_dim, dim, num_heads);
  const Tensor in = grad.contiguous();
  const Tensor out = resized(grad, dim, num_heads * head_dim);
  HeadLayout m = head_layout(in, head_dim, dim, num_heads, 1);
  map_scatter(m, heads);
  move_runs(m, in, out);
  return out;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("head_gather", TORCH_BOX(&kdfast::cpu::head_gather));
  m.impl("head_gather_bwd", TORCH_BOX(&kdfast::cpu::head_gather_bwd));
}
