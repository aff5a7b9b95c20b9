// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/peak_vectors.h"

namespace kdfast::cpu {
namespace {

typedef float V __attribute__((vector_size(16)));

double fp32_peak() {
  const volatile float one = 1;  // to the compiler it may be any number
  const V ones = one - V{};
#if defined(__aarch64__)
  return vector_peak<24, V>(ones, [](V& sum, V x) {
    __asm__ volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(sum) : "w"(x));
  });
#else
  // Without an instruction for both: a product and a sum, which take the 16 registers of SSE.
  return vector_peak<14, V>(ones, [](V& sum, V x) { sum = sum * x + x; });
#endif
}

}  // namespace

constinit const PeakLoops peak_generic = {fp32_peak, fp32_peak};
}  // namespace kdfast::cpu
