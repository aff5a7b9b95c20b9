// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "cpu/isa/peak_vectors.h"

namespace kdfast::cpu {
namespace {

double fp32_peak() {
  return vector_peak<24, __m512>(_mm512_set1_ps(1), [](__m512& sum, __m512 ones) {
    __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(sum) : "v"(ones));
  });
}

// Two multiply-adds a lane.
double bf16_peak() {
  const __m512i pairs = _mm512_set1_epi32(0x3f803f80);
  return vector_peak<24, __m512>(pairs, [](__m512& sum, __m512i ones) {
    __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(ones));
  });
}

}  // namespace

constinit const PeakLoops peak_avx512 = {fp32_peak, fp32_peak};
constinit const PeakLoops peak_avx512_bf16 = {fp32_peak, bf16_peak};
}  // namespace kdfast::cpu
