// SPDX-License-Identifier: Apache-2.0
// The arithmetic of bf16 products with sums in fp32, and its packed forms: AVX512_BF16.
#pragma once
#include "cpu/isa/attention_packing.h"

namespace kdfast::cpu {
namespace {

// As Fp32Math.
struct Bf16Math {
  static constexpr int64_t kPair = 2;
  static constexpr bool kNeighbours = true;
  static constexpr int64_t kWidth = kVector;
  static constexpr int kDegree = 3;  // what rounding P to bf16 leaves of a better one is nothing
  static Vec16 multiply_add(Vec16 sum, Dwords16 a, Dwords16 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static void store(int32_t* row, int64_t d, Vec16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + d / 2), to_bf16(x));
  }
  static void store2(int32_t* to, Vec16 x, Vec16 y) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
  // Writes 16 pairs: dword i holds x[i] and, above it, y[i]. The step between rows is for others.
  static void store_pairs(int32_t* to, Vec16 x, Vec16 y, int64_t = 0) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleave(), both));
  }
  static __m512i interleave() {
    alignas(64) static constexpr int16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_load_si512(kOrder);
  }
  static void copy_row(const Bf16* in, int64_t dim, int32_t* out) {
    for (int64_t d = 0; d < dim; d += 2 * kVector) {
      const int64_t left = dim - d;
      const auto m = static_cast<__mmask32>(left >= 32 ? 0xffffffffu : (1u << left) - 1);
      _mm512_storeu_si512(out + d / 2, _mm512_maskz_loadu_epi16(m, in + d));
    }
  }
  // Rounds to bf16.
  template <class T>
  static void copy_row(const T* in, int64_t dim, int32_t* out) {
    for (int64_t d = 0; d < dim; d += 2 * kVector) {
      const int64_t left = dim - d - kVector;
      const Vec16 x = load16(in + d, tail_mask(dim - d));
      store2(out + d / 2, x, load16(in + d + kVector, tail_mask(left > 0 ? left : 0)));
    }
  }
  static void to_pairs(const int32_t* rows, int64_t width, int64_t count, int64_t columns,
                       int32_t* out, int64_t first = 0) {
    for (int64_t r = 0; r < count; r += 2)
      interleave_rows(rows + r * width, width, kVector, columns, out + (first + r) / 2 * columns);
  }
  // Two neighbouring rows into `columns` dwords; `step` dwords from 32 elements to the next.
  static void interleave_rows(const int32_t* row, int64_t width, int64_t step, int64_t columns,
                              int32_t* out) {
    // Words 0..15 of both rows, or words 16..31, interleaved.
    alignas(64) static constexpr int16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                     37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                     11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t d = 0; d < columns; d += 2 * kVector, row += step) {
      const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + width);
      _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
      if (d + kVector < columns)
        _mm512_storeu_si512(out + d + kVector, _mm512_permutex2var_epi16(a, high, b));
    }
  }
};

}  // namespace
}  // namespace kdfast::cpu
