// SPDX-License-Identifier: Apache-2.0
// Products of bf16 in AMX tiles: 16 rows of 16 dwords, and a product takes 16 dwords of the sum.
//
// The packed forms of attention_packing.h are tile operands as they are: `rows` is a left operand,
// `lanes` and `pairs` are right ones. Tiles do the work of 0 to 3: sums, 4 and 5: left, 6 and 7:
// right.
#pragma once
#include "cpu/isa/bf16_math.h"
#include "cpu/isa/pruned_attention.h"
#include "cpu/isa/split_math.h"

namespace kdfast::cpu {
namespace {

// The tile instructions. Written as asm, because gcc's intrinsics take literal tile numbers only
// and do not tell the compiler that they read and write memory.
struct HardwareTiles {
  // Tile state is per thread; between sessions the CPU need not keep any.
  struct Session {
    Session() {
      struct alignas(64) Config {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session() { __asm__ volatile("tilerelease" ::: "memory"); }
  };
  template <int kTo>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTo));
  }
  // `step` in dwords, here and below.
  template <int kTo>
  static void load(const void* from, int64_t step) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTo), "r"(from), "r"(4 * step)
                     : "memory");
  }
  template <int kFrom>
  static void store(float* to, int64_t step) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kFrom), "r"(to), "r"(4 * step)
                     : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  static void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

// The same in AVX-512, to test on a CPU without AMX what is built upon it.
struct EmulatedTiles {
  struct Session {};
  struct alignas(64) Tile {
    int32_t rows[16][16];
  };
  static Tile* tiles() {
    static thread_local Tile all[8];
    return all;
  }
  template <int kTo>
  static void zero() {
    std::memset(tiles() + kTo, 0, sizeof(Tile));
  }
  template <int kTo>
  static void load(const void* from, int64_t step) {
    for (int64_t r = 0; r < 16; ++r)
      std::memcpy(tiles()[kTo].rows[r], static_cast<const int32_t*>(from) + r * step, 64);
  }
  template <int kFrom>
  static void store(float* to, int64_t step) {
    for (int64_t r = 0; r < 16; ++r) std::memcpy(to + r * step, tiles()[kFrom].rows[r], 64);
  }
  // The lower and the upper elements of the dwords are summed apart, as the instruction does.
  template <int kSum, int kLeft, int kRight>
  static void multiply_add() {
    const auto lower = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
    const auto upper = [](__m512i x) {
      return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-0x10000)));
    };
    for (int64_t r = 0; r < 16; ++r) {
      __m512 even = _mm512_setzero_ps(), odd = even;
      for (int64_t k = 0; k < 16; ++k) {
        const __m512i a = _mm512_set1_epi32(tiles()[kLeft].rows[r][k]);
        const __m512i b = _mm512_load_si512(tiles()[kRight].rows[k]);
        even = _mm512_fmadd_ps(lower(a), lower(b), even);
        odd = _mm512_fmadd_ps(upper(a), upper(b), odd);
      }
      int32_t* sum = tiles()[kSum].rows[r];
      _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(even, odd)));
    }
  }
};

// Products in tiles for the attention kernels; see RegisterTiles for what each one is.
template <class Tiles, class Math = Bf16Math>
struct AmxTiles : Math {
  static constexpr int64_t kRows = 32, kUnit = Math::kWidth, kTokens = 32, kKeys = 32;
  static constexpr bool kSplit = kUnit > kVector;
  // A step of dq reads and writes all sums for 32 keys' worth of products, so it takes many keys.
  static constexpr int64_t kKeysOfDq = 256;
  static constexpr bool kDqTransposed = true;
  using Session = typename Tiles::Session;

  // Adds the products of 16 dwords of a and b to kHigh x kAcross tiles.
  template <int kHigh, int kAcross>
  static void step(const int32_t* a, int64_t a_step, const int32_t* b, int64_t b_step) {
    Tiles::template load<4>(a, a_step);
    Tiles::template load<6>(b, b_step);
    Tiles::template multiply_add<0, 4, 6>();
    if constexpr (kAcross > 1) {
      Tiles::template load<7>(b + 16, b_step);
      Tiles::template multiply_add<1, 4, 7>();
    }
    if constexpr (kHigh > 1) {
      Tiles::template load<5>(a + 16 * a_step, a_step);
      Tiles::template multiply_add<2, 5, 6>();
    }
    if constexpr (kHigh * kAcross > 2) Tiles::template multiply_add<3, 5, 7>();
  }

  // kHigh x kAcross tiles of out (+)= a x b over `steps` dwords; steps of a, b and out in dwords.
  template <int kHigh, int kAcross>
  static void block(const int32_t* a, int64_t a_step, const int32_t* b, int64_t b_step,
                    int64_t steps, float* out, int64_t out_step, bool add) {
    if (add) {
      Tiles::template load<0>(out, out_step);
      if constexpr (kAcross > 1) Tiles::template load<1>(out + 16, out_step);
      if constexpr (kHigh > 1) Tiles::template load<2>(out + 16 * out_step, out_step);
      if constexpr (kHigh * kAcross > 2)
        Tiles::template load<3>(out + 16 * out_step + 16, out_step);
    } else {
      Tiles::template zero<0>();
      if constexpr (kAcross > 1) Tiles::template zero<1>();
      if constexpr (kHigh > 1) Tiles::template zero<2>();
      if constexpr (kHigh * kAcross > 2) Tiles::template zero<3>();
    }
    for (int64_t s = 0; s < steps; s += kUnit, a += kUnit, b += kUnit * b_step) {
      step<kHigh, kAcross>(a, a_step, b, b_step);
      if constexpr (kSplit) {
        step<kHigh, kAcross>(a + 16, a_step, b, b_step);
        step<kHigh, kAcross>(a, a_step, b + 16 * b_step, b_step);
      }
    }
    Tiles::template store<0>(out, out_step);
    if constexpr (kAcross > 1) Tiles::template store<1>(out + 16, out_step);
    if constexpr (kHigh > 1) Tiles::template store<2>(out + 16 * out_step, out_step);
    if constexpr (kHigh * kAcross > 2) Tiles::template store<3>(out + 16 * out_step + 16, out_step);
  }

  // out (rows, columns) (+)= a x b; all three are padded to multiples of 16 rows and columns, and
  // `steps` to multiples of kUnit.
  static void product(const int32_t* a, int64_t a_step, int64_t rows, const int32_t* b,
                      int64_t b_step, int64_t columns, int64_t steps, float* out, int64_t out_step,
                      bool add) {
    for (int64_t r = 0; r < rows; r += 32) {
      for (int64_t d = 0; d < columns; d += 32) {
        const bool high = rows - r > 16, across = columns - d > 16;
        const auto f =
            high ? (across ? &block<2, 2> : &block<2, 1>) : (across ? &block<1, 2> : &block<1, 1>);
        f(a + r * a_step, a_step, b + d, b_step, steps, out + r * out_step + d, out_step, add);
      }
    }
  }

  static void scores(const int32_t* rows, int64_t width, int64_t count, const int32_t* lanes,
                     int64_t columns, int64_t steps, float* out, int64_t out_step) {
    product(rows, width, count < kRows ? count : kRows, lanes, columns, columns, steps, out,
            out_step, false);
  }
  // Added to are finished sums, so that who computed what was there changes no bit.
  static void weighted(const int32_t* weights, int64_t w_row, int64_t count, const int32_t* rows,
                       int64_t columns, int64_t steps, float* out, bool add) {
    const int64_t padded = round_up(count < kRows ? count : kRows, kVector);
    if (!add)
      return product(weights, w_row, padded, rows, columns, columns, steps, out, columns, false);
    alignas(64) float part[kRows * 32];
    for (int64_t d = 0; d < columns; d += 32) {
      const int64_t across = columns - d > 16 ? 32 : 16;
      product(weights, w_row, padded, rows + d, columns, across, steps, part, 32, false);
      for (int64_t r = 0; r < padded; ++r)
        for (int64_t x = 0; x < across; x += kVector) {
          float* to = out + r * columns + d + x;
          _mm512_storeu_ps(to,
                           _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(part + r * 32 + x)));
        }
    }
  }
  static __m512 diagonal(const int32_t* rows, int64_t width, const int32_t* lanes, int64_t columns,
                         int64_t steps) {
    alignas(64) float all[kVector * kVector], out[kVector];
    block<1, 1>(rows, width, lanes, columns, steps, all, kVector, false);
    for (int64_t i = 0; i < kVector; ++i) out[i] = all[i * (kVector + 1)];
    return _mm512_load_ps(out);
  }
};

}  // namespace
}  // namespace kdfast::cpu
