// SPDX-License-Identifier: Apache-2.0
// Vectors of the row kernels: one text for every instruction set, by the compiler's vector types.
// Everything is in an anonymous namespace, since each file that includes this has its own flags.
#pragma once
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/isa/elements.h"
#include "cpu/isa/exponential.h"

namespace kdfast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;  // SSE2 or NEON, which every 64-bit x86 or Arm CPU has
#endif

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(kVecBytes)));
  typedef int32_t I __attribute__((vector_size(kVecBytes)));
  static constexpr int width = kVecBytes / 4;
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(kVecBytes)));
  typedef int64_t I __attribute__((vector_size(kVecBytes)));
  static constexpr int width = kVecBytes / 8;
};
using VF = Lanes<float>::V;
using IF = Lanes<float>::I;
using VD = Lanes<double>::V;

#define KDFAST_INLINE inline __attribute__((always_inline))

template <class To, class From>
KDFAST_INLINE To bit_copy(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}

template <class A>
KDFAST_INLINE typename Lanes<A>::V fill(A x) {
  return x - typename Lanes<A>::V{};  // minus, so that -0.0 survives
}

// --- loads and stores of one vector ---

KDFAST_INLINE VF load(const float* p) {
  VF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

KDFAST_INLINE VD load(const double* p) {
  VD v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

KDFAST_INLINE VF load(const Bf16* p) {
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
  VF v;
  for (int i = 0; i < Lanes<float>::width; ++i) v[i] = load<float>(p[i]);
  return v;
#endif
}

KDFAST_INLINE VF load(const Half* p) {
#if defined(__AVX512F__)
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VF v;
  for (int i = 0; i < Lanes<float>::width; ++i) v[i] = load<float>(p[i]);
  return v;
#endif
}

KDFAST_INLINE void store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof v); }
KDFAST_INLINE void store(double* p, VD v) { __builtin_memcpy(p, &v, sizeof v); }

KDFAST_INLINE void store(Bf16* p, VF v) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16)));
#elif defined(__AVX2__)
  const __m256i bits = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  for (int i = 0; i < Lanes<float>::width; ++i) p[i] = store<Bf16>(v[i]);
#endif
}

KDFAST_INLINE void store(Half* p, VF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#else
  for (int i = 0; i < Lanes<float>::width; ++i) p[i] = store<Half>(v[i]);
#endif
}

// Past the cache, for results that are larger than it; p is a multiple of kVecBytes.
template <class Out, class V>
KDFAST_INLINE void stream(Out* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Out) == 4) return _mm512_stream_ps(p, (__m512)v);
#endif
  store(p, v);
}

// Makes streamed stores visible to other threads.
KDFAST_INLINE void end_stream() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// The first n elements, the other lanes `other`.
template <class A, class In>
KDFAST_INLINE typename Lanes<A>::V load_some(const In* p, int64_t n, A other) {
  In buffer[Lanes<A>::width] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  typename Lanes<A>::V v = load(buffer);
  for (int64_t i = n; i < Lanes<A>::width; ++i) v[i] = other;
  return v;
}

#if defined(__AVX512F__)
template <>
KDFAST_INLINE VF load_some(const float* p, int64_t n, float other) {
  return (VF)_mm512_mask_loadu_ps(_mm512_set1_ps(other), (1u << n) - 1, p);
}
template <>
KDFAST_INLINE VF load_some(const Bf16* p, int64_t n, float other) {
  const __mmask16 some = (1u << n) - 1;
  const __m256i raw = _mm256_maskz_loadu_epi16(some, p);
  const __m512 v = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
  return (VF)_mm512_mask_mov_ps(_mm512_set1_ps(other), some, v);
}
#endif

template <class Out, class V>
KDFAST_INLINE void store_some(Out* p, V v, int64_t n) {
  Out buffer[sizeof(V) / sizeof(v[0])];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// --- arithmetic ---

KDFAST_INLINE VF fma(VF a, VF b, VF c) {
#if defined(__AVX512F__)
  return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

KDFAST_INLINE VD fma(VD a, VD b, VD c) { return a * b + c; }

// A NaN of b is kept, one of a is not.
KDFAST_INLINE VF larger(VF a, VF b) {
#if defined(__AVX512F__)
  return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

KDFAST_INLINE VD larger(VD a, VD b) { return a > b ? a : b; }

struct LaneOps {
  using V = VF;
  KDFAST_INLINE static V splat(float x) { return fill(x); }
  KDFAST_INLINE static V fma(V a, V b, V c) { return kdfast::cpu::fma(a, b, c); }
};

// exp(x) for x <= 0 and NaN: relative error below 2e-7, and 0 below the smallest normal number.
KDFAST_INLINE VF exp_negative(VF x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
  const VF shifted = fma(x, fill(kLog2e), fill(12582912.0f));
  const VF n = shifted - 12582912.0f;
  VF r = fma(n, fill(-0.693359375f), x);  // less n ln 2, in two parts, the first exact
  r = fma(n, fill(2.12194440e-4f), r);
  const IF scale = (bit_copy<IF>(shifted) - (0x4b400000 - 127)) << 23;
  const VF y = exp2_series<LaneOps, 6>(r * kLog2e) * bit_copy<VF>(scale);
  return x < -87.336540f ? fill(0.0f) : y;
}
KDFAST_INLINE VD exp_negative(VD x) { return exp_by_lanes(x); }

KDFAST_INLINE double sum(VF v) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)v;
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
                                            _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))));
#else
  double total = 0;
  for (int i = 0; i < Lanes<float>::width; ++i) total += v[i];
  return total;
#endif
}

KDFAST_INLINE double sum(VD v) {
  double total = 0;
  for (int i = 0; i < Lanes<double>::width; ++i) total += v[i];
  return total;
}

// A sum in double, for loops that wait for memory anyway.
struct WideSum {
  VD low{}, high{};

  KDFAST_INLINE void operator+=(VF v) {
#if defined(__AVX512F__)
    low += (VD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    high += (VD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
    low += (VD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
    high += (VD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
    low += VD{v[0], v[1]};
    high += VD{v[2], v[3]};
#endif
  }
  KDFAST_INLINE void operator+=(VD v) { low += v; }
  KDFAST_INLINE double total() const { return sum(low + high); }
};

// Terms of a lane that are added up in the type of the terms before they go to fp64.
constexpr int64_t kShort = 16;

template <class A>
struct LaneSum {
  typename Lanes<A>::V part{};
  WideSum whole;

  KDFAST_INLINE void operator+=(typename Lanes<A>::V v) { part += v; }
  KDFAST_INLINE void flush() {
    whole += part;
    part = typename Lanes<A>::V{};
  }
  KDFAST_INLINE double total() const { return whole.total(); }
};

template <class V>
KDFAST_INLINE auto largest(V v) {
  auto best = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) best = v[i] > best ? v[i] : best;
  return best;
}

}  // namespace
}  // namespace kdfast::cpu
