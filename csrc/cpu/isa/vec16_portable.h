// SPDX-License-Identifier: Apache-2.0
// Vec16 for any CPU: four of the compiler's vectors of 16 bytes, which are registers of SSE2 and
// NEON. See vec16.h.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/isa/elements.h"

namespace kdfast::cpu {
namespace {

typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef uint16_t Words4 __attribute__((vector_size(8)));

// One vector of 64 bytes would live in memory where there is no such register.
struct Vec16 {
  Floats4 a, b, c, d;
};
using Dwords16 = Vec16;
// The first `count` lanes.
struct Mask16 {
  int64_t count;
};

constexpr int64_t kVector = 16;
constexpr int kTileWide = 1;  // vectors of a register tile
#if defined(__x86_64__)
constexpr int kTile = 3;  // rows of it: 3 x 4 registers of sums of 16
#else
constexpr int kTile = 6;  // 6 x 4 registers of sums, 4 of B and 3 of A, of 32
#endif
constexpr int kWide = 2;  // vectors of a panel

// f of the four parts.
template <class F>
inline Vec16 by_parts(F f, Vec16 x) {
  return {f(x.a), f(x.b), f(x.c), f(x.d)};
}
template <class F>
inline Vec16 by_parts(F f, Vec16 x, Vec16 y) {
  return {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)};
}
inline Floats4 splat4(float x) { return Floats4{x, x, x, x}; }
inline Ints4 bits_of(Floats4 x) { return reinterpret_cast<Ints4>(x); }
inline Floats4 floats_of(Ints4 x) { return reinterpret_cast<Floats4>(x); }
inline Floats4 select4(Ints4 which, Floats4 x, Floats4 y) {
  return floats_of((which & bits_of(x)) | (~which & bits_of(y)));
}

inline Vec16 operator+(Vec16 x, Vec16 y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
inline Vec16 operator-(Vec16 x, Vec16 y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
inline Vec16 operator*(Vec16 x, Vec16 y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
inline Vec16 operator/(Vec16 x, Vec16 y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }

inline Mask16 tail_mask(int64_t count) { return {count < kVector ? count : kVector}; }
inline Mask16 all_or_none(bool all) { return {all ? kVector : 0}; }
inline Mask16 both(Mask16 x, Mask16 y) { return x.count < y.count ? x : y; }

inline Vec16 splat16(float x) { return {splat4(x), splat4(x), splat4(x), splat4(x)}; }
inline Vec16 zero16() { return splat16(0.0f); }
// One rounding where the compiler has an instruction for it, or else two.
inline Vec16 fma16(Vec16 x, Vec16 y, Vec16 z) {
  return {x.a * y.a + z.a, x.b * y.b + z.b, x.c * y.c + z.c, x.d * y.d + z.d};
}
inline Vec16 fms16(Vec16 x, Vec16 y, Vec16 z) {
  return {x.a * y.a - z.a, x.b * y.b - z.b, x.c * y.c - z.c, x.d * y.d - z.d};
}
// A NaN of y is kept, one of x is not.
inline Floats4 max4(Floats4 x, Floats4 y) { return x > y ? x : y; }
inline Vec16 max16(Vec16 x, Vec16 y) { return by_parts(max4, x, y); }
// All lanes are wanted nearly always, so a branch costs less than four masks.
inline Vec16 keep16(Mask16 m, Vec16 x) {
  if (m.count >= kVector) return x;
  const int32_t n = static_cast<int32_t>(m.count);
  const Ints4 limit{n, n, n, n}, lane{0, 1, 2, 3};
  return {floats_of(bits_of(x.a) & (lane < limit)), floats_of(bits_of(x.b) & (lane + 4 < limit)),
          floats_of(bits_of(x.c) & (lane + 8 < limit)),
          floats_of(bits_of(x.d) & (lane + 12 < limit))};
}
inline Vec16 max16(Mask16 m, Vec16 x, Vec16 y) {
  const Vec16 top = max16(x, y);
  if (m.count >= kVector) return top;
  alignas(16) float parts[kVector], tops[kVector];
  std::memcpy(parts, &x, sizeof(parts));
  std::memcpy(tops, &top, sizeof(tops));
  for (int64_t i = 0; i < m.count; ++i) parts[i] = tops[i];
  Vec16 out;
  std::memcpy(&out, parts, sizeof(out));
  return out;
}
inline Floats4 round4(Floats4 x) {
#if defined(__aarch64__)
  return vrndnq_f32(x);
#else
  // A sum with 1.5 * 2^23 has no fraction. Beyond 2^22 a float that exp() meets is far from any
  // result but zero.
  const Floats4 magic = splat4(12582912.0f);
  return (x + magic) - magic;
#endif
}
inline Vec16 round16(Vec16 x) { return by_parts(round4, x); }
// x 2^power for x in [0.5, 2): zero where that is no normal number for all x, and a NaN stays one.
inline Floats4 scale4(Floats4 x, Floats4 power) {
  const Floats4 largest = splat4(128.0f), below = splat4(-126.0f);
  const Ints4 n = __builtin_convertvector(max4(below, largest < power ? largest : power), Ints4);
  const Ints4 tiny = power < splat4(-125.5f);
  return floats_of((bits_of(x) + (n << 23)) & ~tiny);
}
inline Vec16 scale16(Vec16 x, Vec16 power) { return by_parts(scale4, x, power); }
inline float sum16(Vec16 x) {
  const Floats4 s = (x.a + x.b) + (x.c + x.d);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
inline float top16(Vec16 x) {
  const Floats4 s = max4(max4(x.a, x.b), max4(x.c, x.d));
  const float low = s[0] > s[1] ? s[0] : s[1], high = s[2] > s[3] ? s[2] : s[3];
  return low > high ? low : high;
}

// Lanes of x, or from 4 on of y.
#if defined(__clang__)
#define KDFAST_SHUFFLE4(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
#define KDFAST_SHUFFLE4(x, y, i, j, k, l) __builtin_shuffle(x, y, Ints4{i, j, k, l})
#endif

// Neighbours in pairs: (x0 c0 - x1 s0, x1 c1 + x0 s1), or the transposed rotation if kInverse.
template <bool kInverse>
inline Floats4 rotate4(Floats4 x, Floats4 cosine, Floats4 sine) {
  if constexpr (kInverse) {
    const Floats4 y = x * sine;
    return x * cosine + KDFAST_SHUFFLE4(y, y, 1, 0, 3, 2) * Floats4{1, -1, 1, -1};
  } else {
    return x * cosine + KDFAST_SHUFFLE4(x, x, 1, 0, 3, 2) * (sine * Floats4{-1, 1, -1, 1});
  }
}
template <bool kInverse>
inline Vec16 rotate16(Vec16 x, Vec16 cosine, Vec16 sine) {
  return {rotate4<kInverse>(x.a, cosine.a, sine.a), rotate4<kInverse>(x.b, cosine.b, sine.b),
          rotate4<kInverse>(x.c, cosine.c, sine.c), rotate4<kInverse>(x.d, cosine.d, sine.d)};
}

inline Floats4 load4(const float* p) {
  Floats4 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline void store4(float* p, Floats4 x) { std::memcpy(p, &x, sizeof(x)); }
inline Vec16 load16(const float* p) {
  return {load4(p), load4(p + 4), load4(p + 8), load4(p + 12)};
}
inline void store16(float* p, Vec16 x) {
  store4(p, x.a);
  store4(p + 4, x.b);
  store4(p + 8, x.c);
  store4(p + 12, x.d);
}
inline void store16(int32_t* p, Vec16 x) { store16(reinterpret_cast<float*>(p), x); }

inline Dwords16 load_dwords16(const int32_t* p) {
  return load16(reinterpret_cast<const float*>(p));
}
inline Dwords16 splat_dword16(int32_t x) { return splat16(as_float(static_cast<uint32_t>(x))); }
inline Vec16 as_floats(Dwords16 x) { return x; }

// --- 16 elements of a tensor as fp32 ---

inline Words4 load_words(const void* p) {
  Words4 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline void store_words(void* p, Ints4 x) {
  const Words4 words = __builtin_convertvector(x, Words4);
  std::memcpy(p, &words, sizeof(words));
}
inline Ints4 widen(Words4 x) { return __builtin_convertvector(x, Ints4); }

inline Floats4 to_floats(const float* p) { return load4(p); }
inline Floats4 to_floats(const Bf16* p) { return floats_of(widen(load_words(p)) << 16); }
inline Floats4 from_half(Words4 x) {
#if defined(__aarch64__)
  return vcvt_f32_f16(reinterpret_cast<float16x4_t>(x));
#else
  // As load<float>(Half) of elements.h.
  const Ints4 wide = widen(x), magnitude = wide & 0x7fff;
  const Floats4 finite = floats_of(magnitude << 13) * splat4(0x1p112f);
  const Floats4 special = floats_of((magnitude << 13) | 0x7f800000);
  const Floats4 value = select4(magnitude >= 0x7c00, special, finite);
  return floats_of(bits_of(value) | (wide & 0x8000) << 16);
#endif
}
inline Floats4 to_floats(const Half* p) { return from_half(load_words(p)); }

// Rounded to bf16, whose words are the upper halves of the dwords.
inline Ints4 bf16_bits(Floats4 x) {
  const Ints4 bits = bits_of(x);
  const Ints4 r = bits + (((bits >> 16) & 1) + 0x7fff);
  return bits_of(select4(x == x, floats_of(r), floats_of(bits | 0x400000)));
}
// As store<Half>(float) of elements.h; the words are the lower halves.
inline Ints4 half_bits(Floats4 x) {
#if defined(__aarch64__)
  return widen(reinterpret_cast<Words4>(vcvt_f16_f32(x)));
#else
  const Ints4 bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const Ints4 small = bits_of(floats_of(magnitude) + splat4(0.5f)) - 0x3f000000;
  const Ints4 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  const Ints4 infinite = magnitude >= 0x477ff000, nan = magnitude > 0x7f800000;
  const Ints4 is_small = magnitude < 0x38800000;
  const Ints4 finite = (is_small & small) | (~is_small & normal);
  return sign | (infinite & (0x7c00 | (nan & 0x200))) | (~infinite & finite);
#endif
}
inline void from_floats(float* p, Floats4 x) { store4(p, x); }
inline void from_floats(Bf16* p, Floats4 x) { store_words(p, bf16_bits(x) >> 16); }
inline void from_floats(Half* p, Floats4 x) { store_words(p, half_bits(x)); }

template <class T>
inline Vec16 load_all(const T* p) {
  return {to_floats(p), to_floats(p + 4), to_floats(p + 8), to_floats(p + 12)};
}
template <class T>
inline void store_all(T* p, Vec16 x) {
  from_floats(p, x.a);
  from_floats(p + 4, x.b);
  from_floats(p + 8, x.c);
  from_floats(p + 12, x.d);
}
// Some of a vector go by way of a buffer.
template <class T>
inline Vec16 load16(const T* p, Mask16 m) {
  if (m.count >= kVector) return load_all(p);
  alignas(16) T some[kVector] = {};
  std::memcpy(some, p, m.count * sizeof(T));
  return load_all(some);
}
template <class T>
inline void store16(T* p, Mask16 m, Vec16 x) {
  if (m.count >= kVector) return store_all(p, x);
  alignas(16) T some[kVector];
  store_all(some, x);
  std::memcpy(p, some, m.count * sizeof(T));
}

inline Vec16 rounded(Vec16 x, const float*) { return x; }
inline Vec16 rounded(Vec16 x, const Bf16*) {
  return by_parts([](Floats4 part) { return floats_of(bf16_bits(part) & -0x10000); }, x);
}
inline Vec16 rounded(Vec16 x, const Half*) {
  return by_parts(
      [](Floats4 part) { return from_half(__builtin_convertvector(half_bits(part), Words4)); }, x);
}

// 16 x 16 dwords: row i of `in` becomes column i of the first `rows` rows of `out`.
inline void transpose16(const int32_t* in, int64_t in_step, int32_t* out, int64_t out_step,
                        int64_t rows) {
  for (int64_t j = 0; j < 16 && j < rows; j += 4)
    for (int64_t i = 0; i < 16; i += 4) {
      const float* from = reinterpret_cast<const float*>(in) + i * in_step + j;
      float* to = reinterpret_cast<float*>(out) + j * out_step + i;
      const Floats4 a = load4(from), b = load4(from + in_step);
      const Floats4 c = load4(from + 2 * in_step), d = load4(from + 3 * in_step);
      const Floats4 ab_low = KDFAST_SHUFFLE4(a, b, 0, 4, 1, 5);
      const Floats4 ab_high = KDFAST_SHUFFLE4(a, b, 2, 6, 3, 7);
      const Floats4 cd_low = KDFAST_SHUFFLE4(c, d, 0, 4, 1, 5);
      const Floats4 cd_high = KDFAST_SHUFFLE4(c, d, 2, 6, 3, 7);
      store4(to, KDFAST_SHUFFLE4(ab_low, cd_low, 0, 1, 4, 5));
      if (rows - j > 1) store4(to + out_step, KDFAST_SHUFFLE4(ab_low, cd_low, 2, 3, 6, 7));
      if (rows - j > 2) store4(to + 2 * out_step, KDFAST_SHUFFLE4(ab_high, cd_high, 0, 1, 4, 5));
      if (rows - j > 3) store4(to + 3 * out_step, KDFAST_SHUFFLE4(ab_high, cd_high, 2, 3, 6, 7));
    }
}

#undef KDFAST_SHUFFLE4

}  // namespace
}  // namespace kdfast::cpu
