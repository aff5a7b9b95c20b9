// SPDX-License-Identifier: Apache-2.0
// Vec16 for AVX-512 F, BW, DQ and VL: one register. See vec16.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "cpu/isa/elements.h"

namespace kdfast::cpu {
namespace {

using Vec16 = __m512;
using Dwords16 = __m512i;
using Mask16 = __mmask16;

constexpr int64_t kVector = 16;
constexpr int kTile = 6;      // rows of a register tile
constexpr int kTileWide = 4;  // vectors of a register tile: 6 x 4 sums, 4 vectors of B, one of A
constexpr int kWide = 4;      // vectors of a panel

inline Mask16 tail_mask(int64_t count) {
  return static_cast<Mask16>(count >= kVector ? 0xffffu : (1u << count) - 1);
}
inline Mask16 all_or_none(bool all) { return all ? 0xffff : 0; }
inline Mask16 both(Mask16 a, Mask16 b) { return a & b; }

inline Vec16 splat16(float x) { return _mm512_set1_ps(x); }
inline Vec16 zero16() { return _mm512_setzero_ps(); }
inline Vec16 fma16(Vec16 a, Vec16 b, Vec16 c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec16 fms16(Vec16 a, Vec16 b, Vec16 c) { return _mm512_fmsub_ps(a, b, c); }
inline Vec16 max16(Vec16 a, Vec16 b) { return _mm512_max_ps(a, b); }
inline Vec16 max16(Mask16 m, Vec16 a, Vec16 b) { return _mm512_mask_max_ps(a, m, a, b); }
inline Vec16 keep16(Mask16 m, Vec16 x) { return _mm512_maskz_mov_ps(m, x); }
inline Vec16 round16(Vec16 x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec16 scale16(Vec16 x, Vec16 power) { return _mm512_scalef_ps(x, power); }
inline float sum16(Vec16 x) { return _mm512_reduce_add_ps(x); }
inline float top16(Vec16 x) { return _mm512_reduce_max_ps(x); }

// Neighbours in pairs: (x0 c0 - x1 s0, x1 c1 + x0 s1), or the transposed rotation if kInverse.
template <bool kInverse>
inline Vec16 rotate16(Vec16 x, Vec16 cosine, Vec16 sine) {
  constexpr int kSwap = 0xb1;  // neighbours change places
  return kInverse ? _mm512_fmsubadd_ps(x, cosine, _mm512_permute_ps(_mm512_mul_ps(x, sine), kSwap))
                  : _mm512_fmaddsub_ps(x, cosine, _mm512_mul_ps(_mm512_permute_ps(x, kSwap), sine));
}

inline Vec16 load16(const float* p) { return _mm512_loadu_ps(p); }
inline void store16(float* p, Vec16 x) { _mm512_storeu_ps(p, x); }
inline void store16(int32_t* p, Vec16 x) { _mm512_storeu_ps(p, x); }

inline Dwords16 load_dwords16(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Dwords16 splat_dword16(int32_t x) { return _mm512_set1_epi32(x); }
inline Vec16 as_floats(Dwords16 x) { return _mm512_castsi512_ps(x); }

// --- 16 elements of a tensor as fp32 ---

inline Vec16 load16(const float* p, Mask16 m) { return _mm512_maskz_loadu_ps(m, p); }
inline Vec16 load16(const Bf16* p, Mask16 m) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec16 load16(const Half* p, Mask16 m) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
}

inline __m256i to_bf16(Vec16 x) {
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

inline void store16(float* p, Mask16 m, Vec16 x) { _mm512_mask_storeu_ps(p, m, x); }
inline void store16(Bf16* p, Mask16 m, Vec16 x) { _mm256_mask_storeu_epi16(p, m, to_bf16(x)); }
inline void store16(Half* p, Mask16 m, Vec16 x) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec16 rounded(Vec16 x, const float*) { return x; }
inline Vec16 rounded(Vec16 x, const Bf16*) {
  const __m512i wide = _mm512_cvtepu16_epi32(to_bf16(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec16 rounded(Vec16 x, const Half*) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
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

}  // namespace
}  // namespace kdfast::cpu
