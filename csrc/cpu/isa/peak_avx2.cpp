// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "cpu/isa/peak_vectors.h"

namespace kdfast::cpu {
namespace {

double fp32_peak() {
  return vector_peak<12, __m256>(_mm256_set1_ps(1), [](__m256& sum, __m256 ones) {
    __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(sum) : "x"(ones));
  });
}

}  // namespace

constinit const PeakLoops peak_avx2 = {fp32_peak, fp32_peak};
}  // namespace kdfast::cpu
