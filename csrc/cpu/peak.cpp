// SPDX-License-Identifier: Apache-2.0
#include "cpu/peak.h"

#include <time.h>

#include <atomic>

#include "cpu/dispatch.h"
#include "tensor.h"

namespace kdfast::cpu {
namespace {

// CPU time of this thread: what other processes take from the core does not count.
double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

}  // namespace

std::pair<double, double> run_peak(const std::string& isa, bool bf16, double seconds) {
  const PeakLoops& loops = *kernels_of(runnable_isa(isa)).peak;
  const auto loop = bf16 ? loops.bf16 : loops.fp32;
  std::atomic<double> flops{0}, rate{0};
  parallel_for(num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double done = 0, passed = 0;
      const double start = thread_seconds();
      do {
        done += 2 * loop();
        passed = thread_seconds() - start;
      } while (passed < seconds);
      flops += done;
      rate += done / passed;
    }
  });
  return {flops, rate};
}

}  // namespace kdfast::cpu
