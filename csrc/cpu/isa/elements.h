// SPDX-License-Identifier: Apache-2.0
// Element types for files in isa/, which include no ATen; fp16 and bf16 as bits, by integer
// arithmetic.
#pragma once
#include <cstdint>
#include <cstring>

namespace kdfast::cpu {

enum class Element { f64, f32, bf16, f16 };

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace {

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <class A>
inline A load(double x) {
  return static_cast<A>(x);
}
template <class A>
inline A load(float x) {
  return static_cast<A>(x);
}
template <class A>
inline A load(Bf16 x) {
  return as_float(static_cast<uint32_t>(x.bits) << 16);
}
template <class A>
inline A load(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // Moving the 10 + 5 bits up leaves the exponent 112 too small; a multiplication mends it for
  // subnormals too. Infinity and NaN need the full exponent set.
  float value = as_float(magnitude << 13) * as_float(0x77800000u);  // 2^112
  if (magnitude >= 0x7c00u) value = as_float(0x7f800000u | magnitude << 13);
  return as_float(sign | as_bits(value));
}

// One specialisation for each pair of types: a cast of a number to Bf16 or Half compiles, and makes
// its integer part their bits.
template <class T>
T store(double x) = delete;
template <class T>
T store(float x) = delete;
template <>
inline double store<double>(double x) {
  return x;
}
template <>
inline float store<float>(double x) {
  return static_cast<float>(x);
}
template <>
inline float store<float>(float x) {
  return x;
}
template <>
inline Bf16 store<Bf16>(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half store<Half>(float x) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 rounds to a multiple of 2^-24, the subnormal step, in hardware.
    return {static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}
template <>
inline Bf16 store<Bf16>(double x) {
  return store<Bf16>(static_cast<float>(x));
}
template <>
inline Half store<Half>(double x) {
  return store<Half>(static_cast<float>(x));
}

}  // namespace
}  // namespace kdfast::cpu
