// SPDX-License-Identifier: Apache-2.0
// Packing and register tiles of AVX-512 attention kernels, in fp32 (FMA) or bf16 (VDPBF16PS).
//
// Packed data is handled in dwords: one fp32, or two bf16 that are neighbours along the sum of a
// product. So one tile function serves both: broadcast a dword of A, multiply by 16 dwords of B.
//   rows   (row, dword of D)           A operand of a product that sums over D
//   lanes  (panel, dword of D, row)    B operand of a product that sums over D
//   pairs  (kPair rows, D)             B operand of a product that sums over rows
// Included by files compiled for one instruction set only, hence the anonymous namespace.
#pragma once
#include <immintrin.h>
#include <math.h>

#include <cstdint>
#include <cstring>

#include "cpu/attention_geometry.h"
#include "cpu/isa/elements.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kVector = 16;
constexpr int kTile = 6;        // rows of a register tile: 6 x 4 sums, 4 vectors of B and one of A
constexpr int kWide = 4;        // its vectors
constexpr int64_t kAhead = 16;  // rows from a load to its prefetch
constexpr int64_t kPanel = kWide * kVector;

inline int64_t divide_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

inline __mmask16 tail_mask(int64_t count) {
  return static_cast<__mmask16>(count >= kVector ? 0xffffu : (1u << count) - 1);
}

// --- 16 elements of a tensor as fp32 ---

inline __m512 load16(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
inline __m512 load16(const Bf16* p, __mmask16 m) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 load16(const Half* p, __mmask16 m) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
}

inline __m256i to_bf16(__m512 x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
}

inline void store16(float* p, __mmask16 m, __m512 x) { _mm512_mask_storeu_ps(p, m, x); }
inline void store16(Bf16* p, __mmask16 m, __m512 x) { _mm256_mask_storeu_epi16(p, m, to_bf16(x)); }
inline void store16(Half* p, __mmask16 m, __m512 x) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline __m512 rounded(__m512 x, const float*) { return x; }
inline __m512 rounded(__m512 x, const Bf16*) {
  const __m512i wide = _mm512_cvtepu16_epi32(to_bf16(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 rounded(__m512 x, const Half*) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// --- arithmetic of the two kinds of products ---

template <int kDegree>
inline __m512 exp2_poly(__m512 f);
template <>
inline __m512 exp2_poly<3>(__m512 f) {  // relative error 7.5e-5 on [-0.5, 0.5]
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0551716695f), f, _mm512_set1_ps(0.242611125f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693260986f));
  return _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999928073f));
}
template <>
inline __m512 exp2_poly<6>(__m512 f) {  // relative error 1.9e-9 on [-0.5, 0.5]
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.000153458121f), f, _mm512_set1_ps(0.00133999313f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00961848896f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0555032878f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240226469f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693147206f));
  return _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
}

template <int kDegree>
inline __m512 exponential(__m512 x) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 r = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_poly<kDegree>(_mm512_sub_ps(y, r)), r);
}

struct Fp32Math {
  using Element = float;
  static constexpr int64_t kPair = 1;
  static constexpr int kDegree = 6;
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  // Writes 16 values x as packed elements along a row.
  static void store(int32_t* to, __mmask16 m, __m512 x) { _mm512_mask_storeu_ps(to, m, x); }
  // Writes 32 neighbours of a row.
  static void store2(int32_t* to, __m512 x, __m512 y) {
    _mm512_storeu_ps(to, x);
    _mm512_storeu_ps(to + kVector, y);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Math {
  using Element = Bf16;
  static constexpr int64_t kPair = 2;
  static constexpr int kDegree = 3;  // what rounding P to bf16 leaves of a better one is nothing
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static void store(int32_t* to, __mmask16 m, __m512 x) {
    _mm256_mask_storeu_epi16(to, m, to_bf16(x));
  }
  static void store2(int32_t* to, __m512 x, __m512 y) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
  // Writes 16 pairs: dword i holds x[i] and, above it, y[i].
  static void store_pairs(int32_t* to, __m512 x, __m512 y) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleave(), both));
  }
  static __m512i interleave() {
    alignas(64) static constexpr int16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_load_si512(kOrder);
  }
};
#endif

// --- packing ---

// Token and table row of a window's tokens, one after the other.
struct Walk {
  const WindowSpan& span;
  int64_t run, column;

  Walk(const WindowSpan& s, int64_t i) : span(s), run(i / s.length), column(i % s.length) {}
  int64_t token() const { return span.first + run * span.token_step + column; }
  int64_t table_row() const { return run * span.table_step + column; }
  void next() {
    if (++column == span.length) column = 0, ++run;
  }
};

// y = R x, or R^T x if kInverse, for one row of fp32; x and y have room for whole vectors.
template <bool kInverse>
inline void rotate(const RotaryTable<float>& t, int64_t table_row, int64_t dim, float* x) {
  if (t.cos == nullptr || table_row < t.prefix) return;
  if (!t.interleaved) return rotate_row(t, table_row, dim, kInverse, x);
  const float* c = t.cos + (table_row - t.skipped) * dim;
  const float* s = t.sin + (table_row - t.skipped) * dim;
  for (int64_t d = 0; d < dim; d += kVector) {
    const __mmask16 m = tail_mask(dim - d);
    const __m512 value = _mm512_loadu_ps(x + d), sine = load16(s + d, m);
    const __m512 cosine = load16(c + d, m);
    constexpr int kSwap = 0xb1;  // neighbours change places
    const __m512 y = kInverse
                         ? _mm512_fmsubadd_ps(value, cosine,
                                              _mm512_permute_ps(_mm512_mul_ps(value, sine), kSwap))
                         : _mm512_fmaddsub_ps(value, cosine,
                                              _mm512_mul_ps(_mm512_permute_ps(value, kSwap), sine));
    _mm512_storeu_ps(x + d, y);
  }
}

inline void copy_row(const Bf16* in, int64_t dim, int32_t* out, const Bf16*) {
  for (int64_t d = 0; d < dim; d += 2 * kVector) {
    const int64_t left = dim - d;
    const auto m = static_cast<__mmask32>(left >= 32 ? 0xffffffffu : (1u << left) - 1);
    _mm512_storeu_si512(out + d / 2, _mm512_maskz_loadu_epi16(m, in + d));
  }
}
template <class T>
inline void copy_row(const T* in, int64_t dim, int32_t* out, const float*) {
  for (int64_t d = 0; d < dim; d += kVector)
    _mm512_storeu_ps(out + d, load16(in + d, tail_mask(dim - d)));
}

// How a head's rows are read: rotated or not, and with the sign of the scale.
struct Reading {
  int64_t dim;
  const RotaryTable<float>* table;  // null: not rotated
  float sign;
};

// One row as packed elements, zero beyond D up to a whole vector of dwords.
template <class T, class M>
inline void pack_row(const T* in, int64_t table_row, const Reading& how, float* buffer,
                     int32_t* out) {
  using E = typename M::Element;
  const bool turn =
      how.table != nullptr && how.table->cos != nullptr && table_row >= how.table->prefix;
  if (!turn && how.sign == 1.0f) return copy_row(in, how.dim, out, static_cast<const E*>(nullptr));
  for (int64_t d = 0; d < how.dim; d += kVector)
    _mm512_storeu_ps(buffer + d, load16(in + d, tail_mask(how.dim - d)));
  if (turn) rotate<false>(*how.table, table_row, how.dim, buffer);
  const __m512 sign = _mm512_set1_ps(how.sign);
  const int64_t padded = divide_up(how.dim, kVector * M::kPair) * kVector * M::kPair;
  for (int64_t d = 0; d < padded; d += kVector) {
    const __m512 x = d < how.dim ? rounded(_mm512_mul_ps(_mm512_loadu_ps(buffer + d), sign), in)
                                 : _mm512_setzero_ps();
    const __mmask16 m = tail_mask(how.dim - d > 0 ? how.dim - d : 0);
    M::store(out + d / M::kPair, 0xffff, _mm512_maskz_mov_ps(m, x));
  }
}

// `count` rows from `walk` on, then zero rows up to `padded`.
template <class T, class M>
inline void pack_rows(const T* base, int64_t step, Walk& walk, int64_t count, int64_t padded,
                      const Reading& how, float* buffer, int32_t* out) {
  const int64_t width = divide_up(how.dim, kVector * M::kPair) * kVector;
  for (int64_t r = 0; r < count; ++r, walk.next()) {
    const T* row = base + walk.token() * step;
    // Rows of one head lie up to a page apart, where the hardware does not prefetch.
    const char* ahead = reinterpret_cast<const char*>(row + kAhead * step);
    for (int64_t b = 0; b < how.dim * static_cast<int64_t>(sizeof(T)); b += 64)
      _mm_prefetch(ahead + b, _MM_HINT_T0);
    pack_row<T, M>(row, walk.table_row(), how, buffer, out + r * width);
  }
  if (padded > count) std::memset(out + count * width, 0, (padded - count) * width * 4);
}

// 16 x 16 dwords: row i of `in` becomes column i of the first `rows` rows of `out`.
inline void transpose16(const int32_t* in, int64_t in_step, int32_t* out, int64_t out_step,
                        int64_t rows) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * in_step);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (i < rows) _mm512_storeu_si512(out + i * out_step, a[i]);
}

// 16 packed rows (from row `first` of `total` padded to whole vectors) into the lanes form, whose
// panels are kWide vectors wide, the last one narrower.
inline void to_lanes(const int32_t* rows, int64_t width, int64_t first, int64_t total,
                     int64_t steps, int32_t* out) {
  const int64_t panel = first / kPanel * kPanel;
  const int64_t lanes = total - panel < kPanel ? total - panel : kPanel;
  int32_t* to = out + panel * steps + (first - panel);
  for (int64_t s = 0; s < steps; s += kVector)
    transpose16(rows + s, width, to + s * lanes, lanes, steps - s);
}

// `count` packed rows (a multiple of kPair) into the pairs form of `columns` dwords.
inline void to_pairs(const int32_t* rows, int64_t width, int64_t count, int64_t columns,
                     int32_t* out, const Bf16*) {
  // Words 0..15 of both rows, or words 16..31, interleaved.
  alignas(64) static constexpr int16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t r = 0; r < count; r += 2, out += columns) {
    for (int64_t d = 0; d < columns; d += 2 * kVector) {
      const __m512i a = _mm512_loadu_si512(rows + r * width + d / 2);
      const __m512i b = _mm512_loadu_si512(rows + (r + 1) * width + d / 2);
      _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
      if (d + kVector < columns)
        _mm512_storeu_si512(out + d + kVector, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}
inline void to_pairs(const int32_t* rows, int64_t width, int64_t count, int64_t columns,
                     int32_t* out, const float*) {
  for (int64_t r = 0; r < count; ++r) std::memcpy(out + r * columns, rows + r * width, columns * 4);
}

// --- products ---

// out[r, 16 v ...] (+)= sum over s of a[r, s] * b[s, 16 v ...] for kTile rows; strides in dwords.
// Not inlined: the sums must stay in registers, and what surrounds them would push some out.
template <class M, int kW>
__attribute__((noinline)) void tile(const int32_t* a, int64_t a_row, int64_t a_step,
                                    const int32_t* b, int64_t b_step, int64_t steps, float* out,
                                    int64_t out_step, bool add) {
  __m512 sum[kTile][kW];
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kW; ++v) sum[r][v] = _mm512_setzero_ps();
  // Two pointers and one stride reach six rows by x86 addressing.
  const int32_t* low = a;
  const int32_t* high = a + 3 * a_row;
  for (int64_t s = 0; s < steps; ++s, low += a_step, high += a_step, b += b_step) {
    __m512i right[kW];
#pragma GCC unroll 8
    for (int v = 0; v < kW; ++v) right[v] = _mm512_loadu_si512(b + v * kVector);
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) {
      const __m512i left = _mm512_set1_epi32(r < 3 ? low[r * a_row] : high[(r - 3) * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kW; ++v) sum[r][v] = M::multiply_add(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kW; ++v) {
      float* to = out + r * out_step + v * kVector;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]) : sum[r][v]);
    }
  }
}

// The same for any number of vectors in [1, kWide].
template <class M>
inline void tile(int64_t vectors, const int32_t* a, int64_t a_row, int64_t a_step, const int32_t* b,
                 int64_t b_step, int64_t steps, float* out, int64_t out_step, bool add) {
  const auto f = vectors >= 4   ? &tile<M, 4>
                 : vectors == 3 ? &tile<M, 3>
                 : vectors == 2 ? &tile<M, 2>
                                : &tile<M, 1>;
  f(a, a_row, a_step, b, b_step, steps, out, out_step, add);
}

// out (kTile rows of `columns`, out_step apart) (+)= weights x rows, both along `steps`. Chains of
// more than kChain additions are cut, to lose no more in fp32 than a matrix product does.
template <class M>
inline void weighted_rows(const int32_t* weights, int64_t w_row, int64_t w_step,
                          const int32_t* rows, int64_t columns, int64_t steps, float* out,
                          bool add) {
  constexpr int64_t kChain = 512;
  for (int64_t d = 0; d < columns; d += kWide * kVector)
    for (int64_t s = 0; s < steps; s += kChain)
      tile<M>((columns - d) / kVector, weights + s * w_step, w_row, w_step, rows + s * columns + d,
              columns, steps - s < kChain ? steps - s : kChain, out + d, columns, add || s > 0);
}

}  // namespace
}  // namespace kdfast::cpu
