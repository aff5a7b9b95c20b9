// SPDX-License-Identifier: Apache-2.0
// Vectors of the width that the including file is compiled for, exp, log1p and a small GEMM.
// Everything is local to the including file: two instruction sets must not share a symbol.
#pragma once
#include <cstdint>

#include "cpu/isa/exponential.h"

namespace kdfast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64, kMaxVectors = 4;  // 24 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32, kMaxVectors = 2;  // 12 of 16
#else
constexpr int64_t kVectorBytes = 16, kMaxVectors = 2;
#endif
constexpr int64_t kRows = 6;  // rows of a GEMM step

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kWidth = kVectorBytes / sizeof(T);
template <class T>
constexpr int64_t kPanelColumns = kMaxVectors * kWidth<T>;

template <class T>
inline Vec<T> load_vector(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
inline void store_vector(T* p, Vec<T> x) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = x;
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
inline T sum(Vec<T> x) {
  // In pairs: a chain would round as often as there are lanes, and a whole row of a map shares it.
  T part[kWidth<T>];
  store_vector(part, x);
  for (int64_t w = kWidth<T> / 2; w > 0; w /= 2)
    for (int64_t i = 0; i < w; ++i) part[i] += part[i + w];
  return part[0];
}
template <class T>
inline T largest(Vec<T> x) {
  T top = x[0];
  for (int64_t i = 1; i < kWidth<T>; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

inline Vec<double> exp(Vec<double> x) { return exp_by_lanes(x); }

inline Vec<double> log1p_unit(Vec<double> x) {
  for (int64_t i = 0; i < kWidth<double>; ++i) x[i] = __builtin_log1p(x[i]);
  return x;
}

// A: a[m * am + k * ak]. B: rows of `stride` values, in panels of kPanelColumns `panel` apart.
template <class T>
struct Left {
  const T* a;
  int64_t am, ak;
};
template <class T>
struct Right {
  const T* b;
  int64_t stride, panel;
};

// c (kRows, vectors) += or = a b, over `depth`.
template <class T, int V, bool add>
inline void gemm_step(int64_t depth, Left<T> a, const T* b, int64_t stride, T* c, int64_t ldc) {
  Vec<T> acc[kRows][V];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[m][v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load_vector(b + k * stride + v * kWidth<T>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> left = splat(a.a[m * a.am + k * a.ak]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* to = c + m * ldc + v * kWidth<T>;
      store_vector(to, add ? load_vector(to) + acc[m][v] : acc[m][v]);
    }
}

// One step of kRows rows and up to kPanelColumns columns: c += or = a b.
template <class T, bool add>
inline void gemm_strip(int64_t vectors, int64_t depth, Left<T> a, const T* b, int64_t stride, T* c,
                       int64_t ldc) {
  if constexpr (kMaxVectors == 4) {
    if (vectors == 3) gemm_step<T, 3, add>(depth, a, b, stride, c, ldc);
    if (vectors >= 4) gemm_step<T, 4, add>(depth, a, b, stride, c, ldc);
  } else if (vectors >= 3) {
    gemm_step<T, 2, add>(depth, a, b, stride, c, ldc);
  }
  if (vectors == 2) gemm_step<T, 2, add>(depth, a, b, stride, c, ldc);
  if (vectors == 1) gemm_step<T, 1, add>(depth, a, b, stride, c, ldc);
}

// c (rows, columns) += or = a b; writes whole steps of kRows rows and whole vectors of columns.
// Each kChain products are summed by themselves, to round no more than a matrix product of BLAS.
template <class T, bool add, int64_t kChain = 64>
void gemm(int64_t rows, int64_t columns, int64_t depth, Left<T> a, Right<T> b, T* c, int64_t ldc) {
  for (int64_t j = 0; j < columns; j += kPanelColumns<T>) {
    const T* panel = b.b + j / kPanelColumns<T> * b.panel;
    const int64_t vectors = (columns - j + kWidth<T> - 1) / kWidth<T>;
    for (int64_t i = 0; i < rows; i += kRows) {
      T* out = c + i * ldc + j;
      for (int64_t k = 0; k < depth; k += kChain) {
        const int64_t steps = depth - k < kChain ? depth - k : kChain;
        const Left<T> left{a.a + i * a.am + k * a.ak, a.am, a.ak};
        const T* right = panel + k * b.stride;
        if (add || k > 0)
          gemm_strip<T, true>(vectors, steps, left, right, b.stride, out, ldc);
        else
          gemm_strip<T, false>(vectors, steps, left, right, b.stride, out, ldc);
      }
    }
  }
}

// x (rows, columns) row-major -> its transpose as panels of kPanelColumns rows of x; past the last:
// zero.
template <class T>
void pack_transposed(const T* x, int64_t rows, int64_t columns, int64_t ldx, T* panels) {
  for (int64_t i = 0; i < rows; i += kPanelColumns<T>) {
    T* to = panels + i * columns;
    const int64_t used = rows - i < kPanelColumns<T> ? rows - i : kPanelColumns<T>;
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < used; ++r) to[c * kPanelColumns<T> + r] = x[(i + r) * ldx + c];
      for (int64_t r = used; r < kPanelColumns<T>; ++r) to[c * kPanelColumns<T> + r] = 0;
    }
  }
}

}  // namespace
}  // namespace kdfast::cpu
