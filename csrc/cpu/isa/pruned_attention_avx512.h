// SPDX-License-Identifier: Apache-2.0
// Forward and backward of one head for AVX-512, over the products M: RegisterTiles of this file, or
// the AmxTiles of amx_tiles.h.
//
// Whole rows of scores of a few queries stay in L1 or L2, so the softmax needs one pass and no
// rescaling. The backward works on transposed scores (keys are rows, queries are lanes): there lse
// and delta load as vectors, and dk and dv of a block of keys are summed in registers.
#pragma once
#include "cpu/isa/avx512_tiles.h"
#include "cpu/isa/pruned_attention.h"

namespace kdfast::cpu {
namespace {

template <class A>
A* take(char*& scratch, int64_t count) {
  A* out = reinterpret_cast<A*>(scratch);
  scratch += round_up(count * static_cast<int64_t>(sizeof(A)), 64);
  return out;
}

// Sizes in dwords of the packed forms of one head.
template <class M>
struct Sizes {
  int64_t dim, steps, width, columns;

  explicit Sizes(int64_t d)
      : dim(d),
        steps(round_up(divide_up(d, M::kPair), M::kUnit)),
        width(divide_up(d, kVector * M::kPair) * kVector),
        columns(round_up(d, kVector)) {}
  int64_t lanes(int64_t n) const { return round_up(n, kVector) * steps; }
  int64_t pairs(int64_t n) const { return round_up(n, M::kTokens) / M::kPair * columns; }
  // A row of n weights; the odd stride keeps rows from sharing cache sets.
  static int64_t row(int64_t n) { return round_up(n, 2 * kVector) / M::kPair + kVector; }
};

template <class T, class M>
struct Forward {
  const AttentionHead<float>& head;
  const Sizes<M> size{head.dim};
  const int64_t n = span_tokens(head.span);
  const int64_t vectors = divide_up(n, kVector), stride = Sizes<M>::row(n);
  const int64_t strip = round_up(n, kVector) + kVector;
  static constexpr int64_t kBlock = M::kRows > kVector ? M::kRows : kVector;
  int32_t *keys, *values, *block, *p;
  float *buffer, *scores, *sums;
  float total[M::kRows], pads[M::kRows];

  static int64_t bytes(int64_t n, int64_t dim) {
    const Sizes<M> s(dim);
    const int64_t dwords = s.lanes(n) + s.pairs(n) + kBlock * s.width + M::kRows * s.row(n) +
                           s.width * M::kPair +
                           M::kRows * (round_up(n, kVector) + kVector + s.columns);
    return dwords * 4 + 7 * 64;
  }

  Forward(const AttentionHead<float>& h, char* scratch) : head(h) {
    keys = take<int32_t>(scratch, size.lanes(n));
    values = take<int32_t>(scratch, size.pairs(n));
    block = take<int32_t>(scratch, kBlock * size.width);
    p = take<int32_t>(scratch, M::kRows * stride);
    buffer = take<float>(scratch, size.width * M::kPair);
    scores = take<float>(scratch, M::kRows * strip);
    sums = take<float>(scratch, M::kRows * size.columns);
  }

  void pack() {
    const Reading rotated{head.dim, &head.table, 1.0f}, plain{head.dim, nullptr, 1.0f};
    const T* k = static_cast<const T*>(head.k.data);
    const T* v = static_cast<const T*>(head.v.data);
    Walk key(head.span, 0), value(head.span, 0);
    for (int64_t first = 0; first < n; first += kVector) {
      const int64_t count = n - first < kVector ? n - first : kVector;
      pack_rows<T, M>(k, head.k.step, key, count, kVector, rotated, buffer, block);
      to_lanes(block, size.width, first, vectors * kVector, size.steps, keys);
      pack_rows<T, M>(v, head.v.step, value, count, kVector, plain, buffer, block);
      to_pairs(block, size.width, kVector, size.columns, values + first / M::kPair * size.columns,
               static_cast<const typename M::Element*>(nullptr));
    }
    const int64_t packed = vectors * kVector / M::kPair * size.columns;
    std::memset(values + packed, 0, (size.pairs(n) - packed) * 4);
  }

  // scores of the first `count` queries in `block` against all keys
  void score(int64_t count) {
    for (int64_t first = 0; first < vectors; first += kWide) {
      const int64_t wide = vectors - first < kWide ? vectors - first : kWide;
      M::scores(block, size.width, count, keys + first * kVector * size.steps, wide * kVector,
                size.steps, scores + first * kVector, strip);
    }
  }

  // scores to weights exp(c * score - max), unnormalised; c is |scale|
  void weigh(int r, float c, float* lse) {
    const float* from = scores + r * strip;
    const __mmask16 last = tail_mask(n - (vectors - 1) * kVector);
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int64_t v = 0; v + 1 < vectors; ++v)
      top = _mm512_max_ps(top, _mm512_loadu_ps(from + v * kVector));
    top = _mm512_mask_max_ps(top, last, top, _mm512_loadu_ps(from + (vectors - 1) * kVector));
    float m = _mm512_reduce_max_ps(top) * c;
    if (head.span.pads && m < 0) m = 0;
    const __m512 offset = _mm512_set1_ps(-m), factor = _mm512_set1_ps(c);
    int32_t* to = p + r * stride;
    __m512 sum = _mm512_setzero_ps();
    const auto weight = [&](int64_t v) {
      return exponential<M::kDegree>(
          _mm512_fmadd_ps(_mm512_loadu_ps(from + v * kVector), factor, offset));
    };
    int64_t v = 0;
    for (; v + 2 < vectors; v += 2) {
      const __m512 a = weight(v), b = weight(v + 1);
      sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
      M::store2(to + v * kVector / M::kPair, a, b);
    }
    const bool two = v + 2 == vectors;
    const __m512 a = _mm512_maskz_mov_ps(two ? 0xffff : last, weight(v));
    const __m512 b = two ? _mm512_maskz_mov_ps(last, weight(v + 1)) : _mm512_setzero_ps();
    sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
    M::store2(to + v * kVector / M::kPair, a, b);
    pads[r] = head.span.pads ? head.span.pads * expf(-m) : 0.0f;
    total[r] = _mm512_reduce_add_ps(sum) + pads[r];
    *lse = m + logf(total[r]);
  }

  void apply(int64_t count, T* const* out) {
    M::weighted(p, stride, count, values, size.columns, divide_up(n, M::kPair), sums, false);
    for (int r = 0; r < count; ++r) {
      const __m512 share = _mm512_set1_ps(1.0f / total[r]), pad = _mm512_set1_ps(pads[r]);
      for (int64_t d = 0; d < head.dim; d += kVector) {
        const __mmask16 m = tail_mask(head.dim - d);
        __m512 o = _mm512_loadu_ps(sums + r * size.columns + d);
        if (head.span.pads) o = _mm512_fmadd_ps(pad, load16(head.pad + d, m), o);
        store16(out[r] + d, m, _mm512_mul_ps(o, share));
      }
    }
  }

  void run(int64_t begin, int64_t end, MutableRows to, float* lse) {
    [[maybe_unused]] const typename M::Session session;
    pack();
    const float c = fabsf(head.scale);
    const Reading how{head.dim, &head.table, head.scale < 0 ? -1.0f : 1.0f};
    const T* q = static_cast<const T*>(head.q.data);
    Walk query(head.span, begin), result(head.span, begin);
    for (int64_t i = begin; i < end; i += M::kRows) {
      const int64_t count = end - i < M::kRows ? end - i : M::kRows;
      pack_rows<T, M>(q, head.q.step, query, count, M::kRows, how, buffer, block);
      score(count);
      T* out[M::kRows];
      for (int r = 0; r < count; ++r, result.next()) {
        weigh(r, c, lse + result.token());
        out[r] = static_cast<T*>(to.data) + result.token() * to.step;
      }
      apply(count, out);
    }
  }
};

// One gradient row of fp32: scaled, rotated back unless `table` is null, rounded to T.
template <class T>
void store_row(float* x, float scale, const RotaryTable<float>* table, int64_t dim,
               const Walk& walk, T* out) {
  if (table != nullptr) rotate<true>(*table, walk.table_row(), dim, x);
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t d = 0; d < dim; d += kVector)
    store16(out + d, tail_mask(dim - d), _mm512_mul_ps(_mm512_loadu_ps(x + d), factor));
}

template <class T, class M>
struct Backward {
  const AttentionHead<float>& head;
  const AttentionGrad<float>& grad;
  const Sizes<M> size{head.dim};
  const int64_t n = span_tokens(head.span), chunk = query_chunk(n);
  const int64_t stride = Sizes<M>::row(chunk), pair_stride = chunk + kVector;
  const int64_t key_stride = Sizes<M>::row(round_up(n, M::kKeys)), dq_stride = chunk + kVector;
  const float c = fabsf(head.scale);
  int32_t *k_rows, *v_rows, *k_pairs, *k_columns, *q_lanes, *g_lanes, *q_pairs, *g_pairs, *block,
      *p, *ds, *ds_pairs;
  float *buffer, *lse, *delta, *dq, *turned, *scores, *dp;

  static int64_t bytes(int64_t n, int64_t dim) {
    const Sizes<M> s(dim);
    const int64_t m = query_chunk(n), rows = round_up(n, M::kKeys);
    const int64_t dwords = 2 * rows * s.width + s.pairs(rows) +
                           (M::kDqTransposed ? s.columns * (s.row(rows) + kVector) : 0) +
                           2 * (s.lanes(m) + s.pairs(m)) + kVector * s.width +
                           2 * M::kKeys * s.row(m) + M::kKeysOfDq / 2 * (m + kVector) +
                           s.width * M::kPair + 2 * m +
                           (round_up(m, M::kRows) + kVector) * s.columns + 2 * M::kRows * kPanel;
    return dwords * 4 + 19 * 64;
  }

  Backward(const AttentionHead<float>& h, const AttentionGrad<float>& g, char* scratch)
      : head(h), grad(g) {
    const int64_t rows = round_up(n, M::kKeys);
    k_rows = take<int32_t>(scratch, rows * size.width);
    v_rows = take<int32_t>(scratch, rows * size.width);
    k_pairs = take<int32_t>(scratch, size.pairs(rows));
    k_columns = M::kDqTransposed ? take<int32_t>(scratch, size.columns * key_stride) : nullptr;
    q_lanes = take<int32_t>(scratch, size.lanes(chunk));
    g_lanes = take<int32_t>(scratch, size.lanes(chunk));
    q_pairs = take<int32_t>(scratch, size.pairs(chunk));
    g_pairs = take<int32_t>(scratch, size.pairs(chunk));
    block = take<int32_t>(scratch, kVector * size.width);
    p = take<int32_t>(scratch, M::kKeys * stride);
    ds = take<int32_t>(scratch, M::kKeys * stride);
    ds_pairs = M::kPair == 1 ? nullptr : take<int32_t>(scratch, M::kKeysOfDq / 2 * pair_stride);
    buffer = take<float>(scratch, size.width * M::kPair);
    lse = take<float>(scratch, chunk);
    delta = take<float>(scratch, chunk);
    dq = take<float>(scratch, (round_up(chunk, M::kRows) + kVector) * size.columns);
    turned = M::kDqTransposed ? take<float>(scratch, kVector * size.columns) : nullptr;
    scores = take<float>(scratch, M::kRows * kPanel);
    dp = take<float>(scratch, M::kRows * kPanel);
  }

  static const typename M::Element* element() { return nullptr; }

  void pack_keys() {
    const Reading rotated{head.dim, &head.table, 1.0f}, plain{head.dim, nullptr, 1.0f};
    const int64_t rows = round_up(n, M::kKeys);
    Walk key(head.span, 0), value(head.span, 0);
    pack_rows<T, M>(static_cast<const T*>(head.k.data), head.k.step, key, n, rows, rotated, buffer,
                    k_rows);
    pack_rows<T, M>(static_cast<const T*>(head.v.data), head.v.step, value, n, rows, plain, buffer,
                    v_rows);
    to_pairs(k_rows, size.width, rows, size.columns, k_pairs, element());
    if constexpr (M::kDqTransposed)
      for (int64_t j = 0; j < rows / M::kPair; j += kVector)
        for (int64_t d = 0; d < size.columns; d += kVector)
          transpose16(k_pairs + j * size.columns + d, size.columns, k_columns + d * key_stride + j,
                      key_stride, kVector);
  }

  // Rows of the queries [begin, begin + count), in the two forms, and lse and delta of each.
  void pack_queries(int64_t begin, int64_t count) {
    const Reading rotated{head.dim, &head.table, head.scale < 0 ? -1.0f : 1.0f};
    const Reading plain{head.dim, nullptr, 1.0f};
    const T* q = static_cast<const T*>(head.q.data);
    const T* g = static_cast<const T*>(grad.grad.data);
    const T* o = static_cast<const T*>(grad.out.data);
    const int64_t lanes = round_up(count, kVector);
    Walk query(head.span, begin), upstream = query, output = query, walk = query;
    for (int64_t first = 0; first < count; first += kVector) {
      const int64_t some = count - first < kVector ? count - first : kVector;
      const int64_t pairs = first / M::kPair * size.columns;
      pack_rows<T, M>(q, head.q.step, query, some, kVector, rotated, buffer, block);
      to_lanes(block, size.width, first, lanes, size.steps, q_lanes);
      to_pairs(block, size.width, kVector, size.columns, q_pairs + pairs, element());
      pack_rows<T, M>(g, grad.grad.step, upstream, some, kVector, plain, buffer, block);
      to_lanes(block, size.width, first, lanes, size.steps, g_lanes);
      to_pairs(block, size.width, kVector, size.columns, g_pairs + pairs, element());
      pack_rows<T, M>(o, grad.out.step, output, some, kVector, plain, buffer, block);
      // Where a row of P is a single 1, dP - delta is then exactly zero.
      const int64_t panel = first / kPanel * kPanel;
      const int64_t wide = lanes - panel < kPanel ? lanes - panel : kPanel;
      _mm512_storeu_ps(delta + first,
                       M::diagonal(block, size.width, g_lanes + panel * size.steps + first - panel,
                                   wide, size.steps));
      for (int64_t i = first; i < first + kVector; ++i) {
        // A lane without a query gets P = exp(0 - large) = 0.
        lse[i] = i < count ? grad.lse[walk.token()] : 1e30f;
        if (i >= count) continue;
        if (head.span.pads)
          add_pad(g + walk.token() * grad.grad.step, head.span.pads * expf(-lse[i]));
        walk.next();
      }
    }
    const int64_t packed = lanes / M::kPair * size.columns, all = size.pairs(count);
    std::memset(q_pairs + packed, 0, (all - packed) * 4);
    std::memset(g_pairs + packed, 0, (all - packed) * 4);
  }

  void add_pad(const T* g, float weight) const {
    const __m512 w = _mm512_set1_ps(weight);
    for (int64_t d = 0; d < head.dim; d += kVector) {
      const __mmask16 m = tail_mask(head.dim - d);
      const __m512 sum = _mm512_maskz_loadu_ps(m, grad.dpad + d);
      _mm512_mask_storeu_ps(grad.dpad + d, m, _mm512_fmadd_ps(w, load16(g + d, m), sum));
    }
  }

  // P and dS of kRows keys from `key` on (row `at` of the block, row `above` of ds_pairs) and
  // `wide` vectors of queries.
  void probabilities(int64_t key, int64_t at, int64_t above, int64_t lane, int64_t wide) {
    const int64_t panel = lane * size.steps, row = key * size.width, rows = n - key;
    M::scores(k_rows + row, size.width, rows, q_lanes + panel, wide * kVector, size.steps, scores,
              kPanel);
    M::scores(v_rows + row, size.width, rows, g_lanes + panel, wide * kVector, size.steps, dp,
              kPanel);
    for (int64_t v = 0; v < wide; v += 2) {
      const int64_t to = at * stride + (lane + v * kVector) / M::kPair;
      int32_t* pairs =
          M::kPair == 1 ? nullptr : ds_pairs + above / 2 * pair_stride + lane + v * kVector;
      // The second vector of the last pair may lie beyond the queries: its lanes are zero.
      columns(key, lane + v * kVector, scores + v * kVector, dp + v * kVector, v + 1 < wide, to,
              pairs);
    }
  }

  void columns(int64_t key, int64_t lane, const float* s, const float* g, bool both, int64_t to,
               int32_t* pairs) {
    const __m512 factor = _mm512_set1_ps(c);
    const __mmask16 second = both ? 0xffff : 0;
    const __m512 lse0 = _mm512_loadu_ps(lse + lane), delta0 = _mm512_loadu_ps(delta + lane);
    const __m512 lse1 = _mm512_maskz_loadu_ps(second, lse + lane + kVector);
    const __m512 delta1 = _mm512_maskz_loadu_ps(second, delta + lane + kVector);
    __m512 above[2];
#pragma GCC unroll 8
    for (int r = 0; r < M::kRows; ++r, s += kPanel, g += kPanel, to += stride) {
      // A row without a key must be zero and no more than that: exp(-lse) may be infinite.
      const __mmask16 real = key + r < n ? 0xffff : 0;
      const __m512 x0 = _mm512_fmsub_ps(_mm512_loadu_ps(s), factor, lse0);
      const __m512 x1 = _mm512_fmsub_ps(_mm512_loadu_ps(s + kVector), factor, lse1);
      const __m512 p0 = _mm512_maskz_mov_ps(real, exponential<M::kDegree>(x0));
      const __m512 p1 = _mm512_maskz_mov_ps(real & second, exponential<M::kDegree>(x1));
      const __m512 g0 = _mm512_sub_ps(_mm512_loadu_ps(g), delta0);
      const __m512 g1 = _mm512_sub_ps(_mm512_loadu_ps(g + kVector), delta1);
      const __m512 d0 = _mm512_maskz_mul_ps(real, p0, g0);
      const __m512 d1 = _mm512_maskz_mul_ps(real & second, p1, g1);
      M::store2(p + to, p0, p1);
      M::store2(ds + to, d0, d1);
      if constexpr (M::kPair == 2) {
        if (r % 2) {
          M::store_pairs(pairs, above[0], d0);
          M::store_pairs(pairs + kVector, above[1], d1);
          pairs += pair_stride;
        }
        above[0] = d0;
        above[1] = d1;
      }
    }
  }

  void run_chunk(int64_t begin, int64_t count, bool first, float* sums) {
    pack_queries(begin, count);
    const int64_t vectors = divide_up(count, kVector), steps = divide_up(count, M::kPair);
    int64_t start = 0;  // of the keys that dq lacks
    for (int64_t key = 0; key < n; key += M::kKeys) {
      const int64_t rows = n - key < M::kKeys ? n - key : M::kKeys;
      for (int64_t v = 0; v < vectors; v += kWide)
        for (int64_t r = 0; r < rows; r += M::kRows)
          probabilities(key + r, r, key + r - start, v * kVector,
                        vectors - v < kWide ? vectors - v : kWide);
      for (int64_t r = 0; r < rows; r += M::kRows) {
        float* dk = sums + (key + r) * size.columns;
        float* dv = dk + sum_rows(n) * size.columns;
        M::weighted(ds + r * stride, stride, rows - r, q_pairs, size.columns, steps, dk, !first);
        M::weighted(p + r * stride, stride, rows - r, g_pairs, size.columns, steps, dv, !first);
      }
      if (key + rows < n && key + rows - start < M::kKeysOfDq) continue;
      add_dq(start, key + rows - start, count);
      start = key + rows;
    }
    Walk walk(head.span, begin);
    for (int64_t i = 0; i < count; ++i, walk.next()) {
      float* x = dq + i * size.columns;
      if constexpr (M::kDqTransposed) {
        if (i % kVector == 0) turn_dq(i);
        x = turned + i % kVector * size.columns;
      }
      store_row<T>(x, head.scale, &head.table, head.dim, walk,
                   static_cast<T*>(grad.dq.data) + walk.token() * grad.dq.step);
    }
  }

  // Adds the share of `rows` keys from `start` on to dq, or starts it if they are the first.
  void add_dq(int64_t start, int64_t rows, int64_t count) {
    const int64_t steps = divide_up(rows, M::kPair);
    if constexpr (M::kDqTransposed) {
      M::product(k_columns + start / M::kPair, key_stride, size.columns, ds_pairs, pair_stride,
                 round_up(count, kVector), steps, dq, dq_stride, start > 0);
    } else {
      const int32_t* right = k_pairs + start / M::kPair * size.columns;
      const int64_t ds_step = M::kPair == 1 ? stride : pair_stride;
      for (int64_t i = 0; i < count; i += M::kRows)
        weighted_rows<M>((M::kPair == 1 ? ds : ds_pairs) + i, 1, ds_step, right, size.columns,
                         steps, dq + i * size.columns, start > 0);
    }
  }

  // Rows i to i + 15 of dq into `turned`.
  void turn_dq(int64_t i) const {
    for (int64_t d = 0; d < size.columns; d += kVector)
      transpose16(reinterpret_cast<const int32_t*>(dq + d * dq_stride + i), dq_stride,
                  reinterpret_cast<int32_t*>(turned + d), size.columns, kVector);
  }

  void run(int64_t begin, int64_t end, bool first, float* sums) {
    [[maybe_unused]] const typename M::Session session;
    pack_keys();
    for (int64_t i = begin; i < end; i += chunk, first = false)
      run_chunk(i, end - i < chunk ? end - i : chunk, first, sums);
  }
};

template <class T>
void backward_keys(const AttentionHead<float>& head, const AttentionGrad<float>& grad, float* sums,
                   int64_t count) {
  const int64_t n = span_tokens(head.span), columns = sum_columns(head.dim);
  const int64_t size = 2 * sum_rows(n) * columns;
  for (int64_t part = 1; part < count; ++part)
    for (int64_t x = 0; x < size; x += kVector)
      _mm512_storeu_ps(sums + x, _mm512_add_ps(_mm512_loadu_ps(sums + x),
                                               _mm512_loadu_ps(sums + part * size + x)));
  Walk walk(head.span, 0);
  for (int64_t j = 0; j < n; ++j, walk.next()) {
    // The packed queries carry the sign of the scale.
    store_row<T>(sums + j * columns, fabsf(head.scale), &head.table, head.dim, walk,
                 static_cast<T*>(grad.dk.data) + walk.token() * grad.dk.step);
    store_row<T>(sums + (sum_rows(n) + j) * columns, 1.0f, nullptr, head.dim, walk,
                 static_cast<T*>(grad.dv.data) + walk.token() * grad.dv.step);
  }
}

template <class T, class M>
AttentionKernel<float> avx512_kernel() {
  return {&Forward<T, M>::bytes,
          [](const AttentionHead<float>& head, int64_t begin, int64_t end, MutableRows out,
             float* lse, char* scratch) { Forward<T, M>(head, scratch).run(begin, end, out, lse); },
          &Backward<T, M>::bytes,
          [](const AttentionHead<float>& head, const AttentionGrad<float>& grad, int64_t begin,
             int64_t end, bool first, float* sums,
             char* scratch) { Backward<T, M>(head, grad, scratch).run(begin, end, first, sums); },
          &backward_keys<T>};
}

}  // namespace
}  // namespace kdfast::cpu
