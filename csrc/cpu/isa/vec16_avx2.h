// SPDX-License-Identifier: Apache-2.0
// Vec16 for AVX2 with FMA and F16C: two registers. See vec16.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/isa/elements.h"

namespace kdfast::cpu {
namespace {

struct Vec16 {
  __m256 low, high;
};
using Dwords16 = Vec16;
struct Mask16 {
  __m256i low, high;
  int64_t count;
};

constexpr int64_t kVector = 16;
constexpr int kTile = 6;  // rows of a register tile
// Vectors of a register tile: 6 x 2 registers of sums, 2 of B, one of A.
constexpr int kTileWide = 1;
constexpr int kWide = 2;  // vectors of a panel: those of two operands fit into half of L1

inline Vec16 operator+(Vec16 a, Vec16 b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Vec16 operator-(Vec16 a, Vec16 b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Vec16 operator*(Vec16 a, Vec16 b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Vec16 operator/(Vec16 a, Vec16 b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}

inline Mask16 tail_mask(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i limit = _mm256_set1_epi32(static_cast<int32_t>(count < kVector ? count : kVector));
  return {_mm256_cmpgt_epi32(limit, lane),
          _mm256_cmpgt_epi32(limit, _mm256_add_epi32(lane, _mm256_set1_epi32(8))), count};
}
inline Mask16 all_or_none(bool all) {
  const __m256i bits = _mm256_set1_epi32(-static_cast<int32_t>(all));
  return {bits, bits, all ? kVector : 0};
}
inline Mask16 both(Mask16 a, Mask16 b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high),
          a.count < b.count ? a.count : b.count};
}

inline Vec16 splat16(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec16 zero16() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec16 fma16(Vec16 a, Vec16 b, Vec16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec16 fms16(Vec16 a, Vec16 b, Vec16 c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Vec16 max16(Vec16 a, Vec16 b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Vec16 max16(Mask16 m, Vec16 a, Vec16 b) {
  const Vec16 top = max16(a, b);
  return {_mm256_blendv_ps(a.low, top.low, _mm256_castsi256_ps(m.low)),
          _mm256_blendv_ps(a.high, top.high, _mm256_castsi256_ps(m.high))};
}
inline Vec16 keep16(Mask16 m, Vec16 x) {
  return {_mm256_and_ps(_mm256_castsi256_ps(m.low), x.low),
          _mm256_and_ps(_mm256_castsi256_ps(m.high), x.high)};
}
inline Vec16 round16(Vec16 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
// x 2^power for x in [0.5, 2): zero where that is no normal number for all x, and a NaN stays one.
inline __m256 scale8(__m256 x, __m256 power) {
  const __m256i n = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(128.0f), power));
  const __m256i y = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(n, 23));
  const __m256 tiny = _mm256_cmp_ps(power, _mm256_set1_ps(-125.5f), _CMP_LT_OQ);
  return _mm256_andnot_ps(tiny, _mm256_castsi256_ps(y));
}
inline Vec16 scale16(Vec16 x, Vec16 power) {
  return {scale8(x.low, power.low), scale8(x.high, power.high)};
}
inline float sum16(Vec16 x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float top16(Vec16 x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// Neighbours in pairs: (x0 c0 - x1 s0, x1 c1 + x0 s1), or the transposed rotation if kInverse.
template <bool kInverse>
inline __m256 rotate8(__m256 x, __m256 cosine, __m256 sine) {
  constexpr int kSwap = 0xb1;  // neighbours change places
  return kInverse ? _mm256_fmsubadd_ps(x, cosine, _mm256_permute_ps(_mm256_mul_ps(x, sine), kSwap))
                  : _mm256_fmaddsub_ps(x, cosine, _mm256_mul_ps(_mm256_permute_ps(x, kSwap), sine));
}
template <bool kInverse>
inline Vec16 rotate16(Vec16 x, Vec16 cosine, Vec16 sine) {
  return {rotate8<kInverse>(x.low, cosine.low, sine.low),
          rotate8<kInverse>(x.high, cosine.high, sine.high)};
}

inline Vec16 load16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store16(float* p, Vec16 x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline void store16(int32_t* p, Vec16 x) { store16(reinterpret_cast<float*>(p), x); }

inline Dwords16 load_dwords16(const int32_t* p) {
  return load16(reinterpret_cast<const float*>(p));
}
inline Dwords16 splat_dword16(int32_t x) {
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(x));
  return {all, all};
}
inline Vec16 as_floats(Dwords16 x) { return x; }

// --- 16 elements of a tensor as fp32 ---

// There are no masked moves of words, so some of a vector go by way of a buffer.
inline __m256i load_words(const void* p, Mask16 m) {
  if (m.count >= kVector) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  alignas(32) uint16_t words[kVector] = {};
  std::memcpy(words, p, m.count * sizeof(uint16_t));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
}
inline void store_words(void* p, Mask16 m, __m256i x) {
  if (m.count >= kVector) return _mm256_storeu_si256(static_cast<__m256i*>(p), x);
  alignas(32) uint16_t words[kVector];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), x);
  std::memcpy(p, words, m.count * sizeof(uint16_t));
}
inline __m128i low_half(__m256i x) { return _mm256_castsi256_si128(x); }
inline __m128i high_half(__m256i x) { return _mm256_extracti128_si256(x, 1); }

inline __m256 from_bf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

inline Vec16 load16(const float* p, Mask16 m) {
  if (m.count >= kVector) return load16(p);
  return {_mm256_maskload_ps(p, m.low), _mm256_maskload_ps(p + 8, m.high)};
}
inline Vec16 load16(const Bf16* p, Mask16 m) {
  const __m256i words = load_words(p, m);
  return {from_bf16(low_half(words)), from_bf16(high_half(words))};
}
inline Vec16 load16(const Half* p, Mask16 m) {
  const __m256i words = load_words(p, m);
  return {_mm256_cvtph_ps(low_half(words)), _mm256_cvtph_ps(high_half(words))};
}

// Rounded to bf16, whose words are the upper halves of the dwords.
inline __m256i bf16_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan);
}
inline __m256i to_half(Vec16 x) {
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
}

inline void store16(float* p, Mask16 m, Vec16 x) {
  if (m.count >= kVector) return store16(p, x);  // masked stores are slow on AMD
  _mm256_maskstore_ps(p, m.low, x.low);
  _mm256_maskstore_ps(p + 8, m.high, x.high);
}
inline void store16(Bf16* p, Mask16 m, Vec16 x) {
  const __m256i both = _mm256_packus_epi32(_mm256_srli_epi32(bf16_bits(x.low), 16),
                                           _mm256_srli_epi32(bf16_bits(x.high), 16));
  store_words(p, m, _mm256_permute4x64_epi64(both, 0xd8));
}
inline void store16(Half* p, Mask16 m, Vec16 x) { store_words(p, m, to_half(x)); }

inline Vec16 rounded(Vec16 x, const float*) { return x; }
inline Vec16 rounded(Vec16 x, const Bf16*) {
  const __m256i upper = _mm256_set1_epi32(-0x10000);
  return {_mm256_castsi256_ps(_mm256_and_si256(bf16_bits(x.low), upper)),
          _mm256_castsi256_ps(_mm256_and_si256(bf16_bits(x.high), upper))};
}
inline Vec16 rounded(Vec16 x, const Half*) {
  const __m256i words = to_half(x);
  return {_mm256_cvtph_ps(low_half(words)), _mm256_cvtph_ps(high_half(words))};
}

// 8 x 8 dwords: row i of `in` becomes column i of the first `rows` rows of `out`.
inline void transpose8(const int32_t* in, int64_t in_step, int32_t* out, int64_t out_step,
                       int64_t rows) {
  __m256 a[8], b[8];
  // Rows i and i + 4 of a half each, so that the halves need not be exchanged at the end.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const float* from = reinterpret_cast<const float*>(in) + i % 4 * in_step + i / 4 * 4;
    a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)),
                                _mm_loadu_ps(from + 4 * in_step), 1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    if (i < rows) _mm256_storeu_ps(reinterpret_cast<float*>(out) + i * out_step, a[i]);
}

// 16 x 16 dwords, as above.
inline void transpose16(const int32_t* in, int64_t in_step, int32_t* out, int64_t out_step,
                        int64_t rows) {
  for (int64_t i = 0; i < 16; i += 8)
    for (int64_t j = 0; j < 16 && j < rows; j += 8)
      transpose8(in + i * in_step + j, in_step, out + j * out_step + i, out_step, rows - j);
}

}  // namespace
}  // namespace kdfast::cpu
