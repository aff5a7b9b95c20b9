// SPDX-License-Identifier: Apache-2.0
// Backward of one head, over the products of pruned_attention_forward.h.
//
// It works on transposed scores (keys are rows, queries are lanes): there lse and delta load as
// vectors, and dk and dv of a block of keys are summed in registers.
#pragma once
#include "cpu/isa/pruned_attention_forward.h"

namespace kdfast::cpu {
namespace {

// One gradient row of fp32: scaled, rotated back unless `table` is null, rounded to T.
template <class T>
void store_row(float* x, float scale, const RotaryTable<float>* table, int64_t dim,
               const Walk& walk, T* out) {
  if (table != nullptr) rotate<true>(*table, walk.table_row(), dim, x);
  const Vec16 factor = splat16(scale);
  for (int64_t d = 0; d < dim; d += kVector)
    store16(out + d, tail_mask(dim - d), load16(x + d) * factor);
}

// The same for row `walk.token()` of a tensor, whose rows some steps on are fetched meanwhile.
template <class T>
inline void store_row(float* x, float scale, const RotaryTable<float>* table, int64_t dim,
                      const Walk& walk, MutableRows to) {
  T* out = static_cast<T*>(to.data) + walk.token() * to.step;
  fetch_row(out + kAhead * to.step, dim);
  store_row<T>(x, scale, table, dim, walk, out);
}

// Backward of one head, run_as() to the end. Its phases:
//   1. pack_keys: k and v, once for all queries
//   2. pack_queries: q and the upstream gradient g of a chunk of queries, and per query lse and
//      delta = <g, out>; find_bases with a bias
//   3. per block of keys, probabilities: P = exp(c * score - lse) and dS = P (dP - delta);
//      turn_bias before it, with a bias
//   4. per block of keys: dk += dS^T q and dv += P^T g, into the sums of the head
//   5. add_dq: dq += dS k, then store_row rotates it back and rounds it
// backward_keys makes dk and dv of the sums, when all chunks have added to them.
//
// Packed forms are dwords; see attention_packing.h for rows, lanes and pairs.
template <class T, class M>
struct Backward {
  const AttentionHead<float>& head;
  const AttentionGrad<float>& grad;
  const Sizes<M> size{head.dim};
  const int64_t n = span_tokens(head.span), chunk = query_chunk(n);
  const int64_t stride = Sizes<M>::row(chunk), pair_stride = chunk + kVector;
  const int64_t key_stride = Sizes<M>::row(round_up(n, M::kKeys)), dq_stride = chunk + kVector;
  const int64_t bias_stride = chunk + kVector;
  const float c = fabsf(head.scale);
  // All keys: packed k and v. k_columns is k_pairs transposed, where dq is summed transposed.
  int32_t *k_rows, *v_rows, *k_pairs, *k_columns;
  // The queries of a chunk: packed q and g.
  int32_t *q_lanes, *g_lanes, *q_pairs, *g_pairs;
  int32_t* block;  // rows that are packed at the moment
  // P and dS of a block of keys, keys as rows; ds_pairs is dS as `pairs`.
  int32_t *p, *ds, *ds_pairs;
  float* buffer;  // one row while it is rotated
  // Per query of the chunk. center: see kFarTop; 0 where lse is small.
  float *lse, *center, *delta;
  float *dq, *turned;       // sums of the chunk; 16 rows of them, where they are transposed
  float *scores, *dp;       // kRows keys by a panel of queries
  float *bias, *base;       // a block of keys by the chunk; per query, see row_base
  int64_t first_query = 0;  // of the chunk at hand
  bool centered = false;    // whether a query of it has a large lse

  static int64_t bytes(int64_t n, int64_t dim) {
    const Sizes<M> s(dim);
    const int64_t m = query_chunk(n), rows = round_up(n, M::kKeys);
    const int64_t dwords =
        2 * rows * s.width + s.pairs(rows) +
        (M::kDqTransposed ? s.columns * (s.row(rows) + kVector) : 0) +
        2 * (s.lanes(m) + s.pairs(m)) + kVector * s.width + 2 * M::kKeys * s.row(m) +
        (M::kNeighbours ? M::kKeysOfDq / M::kPair * (m + kVector) : 0) + s.width * M::kPair +
        3 * m + (round_up(m, M::kRows) + kVector) * s.columns + 2 * M::kRows * kPanel +
        (M::kKeys + 1) * (m + kVector);
    return dwords * 4 + 22 * 64;
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
    ds_pairs =
        M::kNeighbours ? take<int32_t>(scratch, M::kKeysOfDq / M::kPair * pair_stride) : nullptr;
    buffer = take<float>(scratch, size.width * M::kPair);
    lse = take<float>(scratch, chunk);
    center = take<float>(scratch, chunk);
    delta = take<float>(scratch, chunk);
    dq = take<float>(scratch, (round_up(chunk, M::kRows) + kVector) * size.columns);
    turned = M::kDqTransposed ? take<float>(scratch, kVector * size.columns) : nullptr;
    scores = take<float>(scratch, M::kRows * kPanel);
    dp = take<float>(scratch, M::kRows * kPanel);
    bias = take<float>(scratch, M::kKeys * bias_stride);
    base = take<float>(scratch, bias_stride);
  }

  // --- 1. keys ---

  __attribute__((noinline)) void pack_keys() {
    const Reading rotated{head.dim, &head.table, 1.0f}, plain{head.dim, nullptr, 1.0f};
    const int64_t rows = round_up(n, M::kKeys);
    for (const Rows& x : {head.k, head.v, head.q, grad.grad, grad.out})
      fetch_first<T>(x, head.span, head.dim);
    Walk key(head.span, 0), value(head.span, 0);
    pack_rows<T, M>(static_cast<const T*>(head.k.data), head.k.step, key, n, rows, rotated, buffer,
                    k_rows);
    pack_rows<T, M>(static_cast<const T*>(head.v.data), head.v.step, value, n, rows, plain, buffer,
                    v_rows);
    M::to_pairs(k_rows, size.width, rows, size.columns, k_pairs);
    if constexpr (M::kDqTransposed)
      for (int64_t j = 0; j < rows / M::kPair; j += kVector)
        for (int64_t d = 0; d < size.columns; d += kVector)
          transpose16(k_pairs + j * size.columns + d, size.columns, k_columns + d * key_stride + j,
                      key_stride, kVector);
  }

  // --- 2. queries of a chunk ---

  // Rows of the queries [begin, begin + count), in the two forms, and lse and delta of each.
  __attribute__((noinline)) void pack_queries(int64_t begin, int64_t count) {
    const Reading rotated{head.dim, &head.table, head.scale < 0 ? -1.0f : 1.0f};
    const Reading plain{head.dim, nullptr, 1.0f};
    const T* q = static_cast<const T*>(head.q.data);
    const T* g = static_cast<const T*>(grad.grad.data);
    const T* o = static_cast<const T*>(grad.out.data);
    const int64_t lanes = round_up(count, kVector);
    size.clear_tail(count, q_pairs);
    size.clear_tail(count, g_pairs);
    centered = false;
    Walk query(head.span, begin), upstream = query, output = query, walk = query;
    for (int64_t first = 0; first < count; first += kVector) {
      const int64_t some = count - first < kVector ? count - first : kVector;
      pack_rows<T, M>(q, head.q.step, query, some, kVector, rotated, buffer, block);
      to_lanes(block, size.width, first, lanes, size.steps, q_lanes);
      M::to_pairs(block, size.width, kVector, size.columns, q_pairs, first);
      pack_rows<T, M>(g, grad.grad.step, upstream, some, kVector, plain, buffer, block);
      to_lanes(block, size.width, first, lanes, size.steps, g_lanes);
      M::to_pairs(block, size.width, kVector, size.columns, g_pairs, first);
      pack_rows<T, M>(o, grad.out.step, output, some, kVector, plain, buffer, block);
      // Where a row of P is a single 1, dP - delta is then exactly zero.
      const int64_t panel = first / kPanel * kPanel;
      const int64_t wide = lanes - panel < kPanel ? lanes - panel : kPanel;
      store16(delta + first,
              M::diagonal(block, size.width, g_lanes + panel * size.steps + first - panel, wide,
                          size.steps));
      for (int64_t i = first; i < first + kVector; ++i) {
        // A lane without a query gets P = exp(0 - large) = 0.
        lse[i] = i < count ? grad.lse[walk.token()] : 1e30f;
        center[i] = 0;
        if (i >= count) continue;
        if (head.span.pads)
          add_pad(g + walk.token() * grad.grad.step, head.span.pads * expf(-lse[i]));
        if (head.bias.data == nullptr && fabsf(lse[i]) > kFarTop) {
          centered = true;
          center[i] = lse[i];
          lse[i] = 0;
        }
        walk.next();
      }
    }
  }

  void add_pad(const T* g, float weight) const {
    const Vec16 w = splat16(weight);
    for (int64_t d = 0; d < head.dim; d += kVector) {
      const Mask16 m = tail_mask(head.dim - d);
      const Vec16 sum = load16(grad.dpad + d, m);
      store16(grad.dpad + d, m, fma16(w, load16(g + d, m), sum));
    }
  }

  // The bias of the queries [begin, begin + count) and of a block of keys from `key` on, keys as
  // rows; zero where there is no query or no key.
  __attribute__((noinline)) void turn_bias(int64_t begin, int64_t count, int64_t key,
                                           int64_t rows) {
    alignas(64) float edge[kVector * kVector];
    for (int64_t i = 0; i < count; i += kVector)
      for (int64_t j = 0; j < rows; j += kVector) {
        const float* from = head.bias.data + (begin + i) * head.bias.step + key + j;
        int64_t step = head.bias.step;
        if (count - i < kVector || rows - j < kVector) {
          for (int64_t r = 0; r < kVector; ++r)
            store16(edge + r * kVector, i + r < count && j < rows
                                            ? load16(from + r * step, tail_mask(rows - j))
                                            : zero16());
          from = edge;
          step = kVector;
        }
        transpose16(reinterpret_cast<const int32_t*>(from), step,
                    reinterpret_cast<int32_t*>(bias + j * bias_stride + i), bias_stride, kVector);
      }
  }

  // What the lse of each of the queries [begin, begin + count) is counted from.
  void find_bases(int64_t begin, int64_t count) {
    for (int64_t i = 0; i < round_up(count, kVector); ++i) {
      Vec16 largest = splat16(i < count ? -INFINITY : 0.0f);
      const float* row = head.bias.data + (begin + i) * head.bias.step;
      for (int64_t j = 0; i < count && j < n; j += kVector) {
        const Mask16 m = tail_mask(n - j);
        largest = max16(m, largest, load16(row + j, m));
      }
      base[i] = row_base(top16(largest));
    }
  }

  // --- 3. P and dS of a block of keys ---

  // Scores of `keys` keys become (c * score - center) / c where a query has a center. Two
  // functions, for a compiler would make an FMA of one: a row with one key that counts must find
  // exactly zero.
  __attribute__((noinline)) void scale_lanes(float* x, int64_t keys, int64_t lanes,
                                             const float* from) const {
    for (int64_t j = 0; j < keys; ++j, x += kPanel)
      for (int64_t i = 0; i < lanes; ++i) x[i] = from[i] != 0 ? x[i] * c : x[i];
  }
  __attribute__((noinline)) void center_lanes(float* x, int64_t keys, int64_t lanes,
                                              const float* from) const {
    for (int64_t j = 0; j < keys; ++j, x += kPanel)
      for (int64_t i = 0; i < lanes; ++i) {
        const float above = x[i] - from[i];
        x[i] = from[i] != 0 ? (above < 0 ? above / c : 0) : x[i];
      }
  }

  // P and dS of kRows keys from `key` on (row `at` of the block, row `above` of ds_pairs) and
  // `wide` vectors of queries.
  __attribute__((noinline)) void probabilities(int64_t key, int64_t at, int64_t above, int64_t lane,
                                               int64_t wide) {
    const int64_t panel = lane * size.steps, row = key * size.width, rows = n - key;
    M::scores(k_rows + row, size.width, rows, q_lanes + panel, wide * kVector, size.steps, scores,
              kPanel);
    M::scores(v_rows + row, size.width, rows, g_lanes + panel, wide * kVector, size.steps, dp,
              kPanel);
    if (centered) {
      const int64_t keys = rows < M::kRows ? rows : M::kRows;
      scale_lanes(scores, keys, wide * kVector, center + lane);
      center_lanes(scores, keys, wide * kVector, center + lane);
    }
    for (int64_t v = 0; v < wide; v += 2) {
      const int64_t to = at * stride + (lane + v * kVector) / M::kPair;
      int32_t* pairs = nullptr;
      if (M::kNeighbours) pairs = ds_pairs + above / M::kPair * pair_stride + lane + v * kVector;
      // The second vector of the last pair may lie beyond the queries: its lanes are zero.
      const int64_t at_lane = lane + v * kVector;
      const bool two = v + 1 < wide;
      if (head.bias.data == nullptr) {
        columns<false>(key, at_lane, scores + v * kVector, dp + v * kVector, two, to, pairs, {});
      } else {
        float* dbias = grad.dbias;
        if (dbias != nullptr) dbias += key * bias_columns(n) + first_query + at_lane;
        columns<true>(key, at_lane, scores + v * kVector, dp + v * kVector, two, to, pairs,
                      {bias + at * bias_stride + at_lane, dbias});
      }
    }
  }

  // The bias of kRows keys and what its gradient is added to, or null.
  struct BiasRows {
    const float* bias;
    float* grad;
  };

  template <bool kBiased>
  void columns(int64_t key, int64_t lane, const float* s, const float* g, bool two, int64_t to,
               int32_t* pairs, BiasRows biased) {
    const Vec16 factor = splat16(c);
    const Mask16 second = all_or_none(two);
    const Vec16 lse0 = load16(lse + lane), delta0 = load16(delta + lane);
    const Vec16 lse1 = load16(lse + lane + kVector, second);
    const Vec16 delta1 = load16(delta + lane + kVector, second);
    Vec16 above[2];
#pragma GCC unroll 8
    for (int r = 0; r < M::kRows; ++r, s += kPanel, g += kPanel, to += stride) {
      // A row without a key must be zero and no more than that: exp(-lse) may be infinite.
      const Mask16 real = all_or_none(key + r < n);
      Vec16 p0, p1;
      if constexpr (kBiased) {
        // Rounded as in the forward: where the scores are large, so is the rounding, and a row with
        // one key that counts must find P = exp(0).
        const Vec16 s0 = fma16(load16(s), factor, load16(biased.bias));
        const Vec16 s1 = fma16(load16(s + kVector), factor, load16(biased.bias + kVector, second));
        const Vec16 base0 = load16(base + lane), base1 = load16(base + lane + kVector, second);
        p0 = masked_exponential<M::kDegree>(s0 - base0 - lse0);
        p1 = masked_exponential<M::kDegree>(s1 - base1 - lse1);
        biased.bias += bias_stride;
      } else {
        p0 = exponential<M::kDegree>(fms16(load16(s), factor, lse0));
        p1 = exponential<M::kDegree>(fms16(load16(s + kVector), factor, lse1));
      }
      p0 = keep16(real, p0);
      p1 = keep16(both(real, second), p1);
      const Vec16 g0 = load16(g) - delta0;
      const Vec16 g1 = load16(g + kVector) - delta1;
      const Vec16 d0 = keep16(real, p0 * g0);
      const Vec16 d1 = keep16(both(real, second), p1 * g1);
      M::store2(p + to, p0, p1);
      M::store2(ds + to, d0, d1);
      if constexpr (kBiased) {
        if (biased.grad != nullptr && key + r < n) {
          store16(biased.grad, load16(biased.grad) + d0);
          if (two) store16(biased.grad + kVector, load16(biased.grad + kVector) + d1);
          biased.grad += bias_columns(n);
        }
      }
      if constexpr (M::kNeighbours) {
        if (r % 2) {
          M::store_pairs(pairs, above[0], d0, pair_stride);
          M::store_pairs(pairs + kVector, above[1], d1, pair_stride);
          pairs += pair_stride;
        }
        above[0] = d0;
        above[1] = d1;
      }
    }
  }

  // --- a chunk of queries: phases 2 to 5 ---

  template <class Self>
  void run_chunk(Self& self, int64_t begin, int64_t count, bool first, float* sums) {
    first_query = begin;
    self.pack_queries(begin, count);
    if (head.bias.data != nullptr) find_bases(begin, count);
    const int64_t vectors = divide_up(count, kVector), steps = divide_up(count, M::kPair);
    int64_t start = 0;  // of the keys that dq lacks
    for (int64_t key = 0; key < n; key += M::kKeys) {
      const int64_t rows = n - key < M::kKeys ? n - key : M::kKeys;
      if (head.bias.data != nullptr) turn_bias(begin, count, key, rows);
      for (int64_t v = 0; v < vectors; v += kWide)
        for (int64_t r = 0; r < rows; r += M::kRows)
          self.probabilities(key + r, r, key + r - start, v * kVector,
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
      store_row<T>(x, head.scale, &head.table, head.dim, walk, grad.dq);
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
      const int64_t ds_step = M::kNeighbours ? pair_stride : stride;
      for (int64_t i = 0; i < count; i += M::kRows)
        M::weighted_columns((M::kNeighbours ? ds_pairs : ds) + i, ds_step, right, size.columns,
                            steps, dq + i * size.columns, start > 0);
    }
  }

  // Rows i to i + 15 of dq into `turned`.
  void turn_dq(int64_t i) const {
    for (int64_t d = 0; d < size.columns; d += kVector)
      transpose16(reinterpret_cast<const int32_t*>(dq + d * dq_stride + i), dq_stride,
                  reinterpret_cast<int32_t*>(turned + d), size.columns, kVector);
  }

  // `self` is this, as what it was derived to: attention_distill has more to pack, and other
  // scores.
  template <class Self>
  void run_as(Self& self, int64_t begin, int64_t end, bool first, float* sums) {
    [[maybe_unused]] const typename M::Session session;
    pack_keys();
    for (int64_t i = begin; i < end; i += chunk, first = false)
      run_chunk(self, i, end - i < chunk ? end - i : chunk, first, sums);
  }
  void run(int64_t begin, int64_t end, bool first, float* sums) {
    run_as(*this, begin, end, first, sums);
  }
};

template <class T>
void backward_keys(const AttentionHead<float>& head, const AttentionGrad<float>& grad, float* sums,
                   int64_t count) {
  const int64_t n = span_tokens(head.span), columns = sum_columns(head.dim);
  const int64_t size = 2 * sum_rows(n) * columns;
  for (int64_t part = 1; part < count; ++part)
    for (int64_t x = 0; x < size; x += kVector)
      store16(sums + x, load16(sums + x) + load16(sums + part * size + x));
  Walk walk(head.span, 0);
  for (int64_t j = 0; j < n; ++j, walk.next()) {
    // The packed queries carry the sign of the scale.
    store_row<T>(sums + j * columns, fabsf(head.scale), &head.table, head.dim, walk, grad.dk);
    store_row<T>(sums + (sum_rows(n) + j) * columns, 1.0f, nullptr, head.dim, walk, grad.dv);
  }
}

}  // namespace
}  // namespace kdfast::cpu
