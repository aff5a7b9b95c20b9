// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/peak.h"

namespace kdfast::cpu {
namespace {

constexpr int kNumbers = 16 * 16;  // of a tile of fp32

template <class Tiles, int kTo>
double sum_of() {
  alignas(64) float tile[kNumbers];
  Tiles::template store<kTo>(tile, 16);
  double count = 0;
  for (const float x : tile) count += x;
  return count;
}

// Six tiles of sums hide the latency; the other two are the operands, which may not be the same.
template <class Tiles>
double bf16_peak() {
  [[maybe_unused]] const typename Tiles::Session session;
  alignas(64) int32_t ones[kNumbers];
  for (int32_t& pair : ones) pair = 0x3f803f80;
  Tiles::template load<6>(ones, 16);
  Tiles::template load<7>(ones, 16);
  Tiles::template zero<0>();
  Tiles::template zero<1>();
  Tiles::template zero<2>();
  Tiles::template zero<3>();
  Tiles::template zero<4>();
  Tiles::template zero<5>();
  for (int64_t s = 0; s < 4096; ++s) {
    Tiles::template multiply_add<0, 6, 7>();
    Tiles::template multiply_add<1, 6, 7>();
    Tiles::template multiply_add<2, 6, 7>();
    Tiles::template multiply_add<3, 6, 7>();
    Tiles::template multiply_add<4, 6, 7>();
    Tiles::template multiply_add<5, 6, 7>();
  }
  return sum_of<Tiles, 0>() + sum_of<Tiles, 1>() + sum_of<Tiles, 2>() + sum_of<Tiles, 3>() +
         sum_of<Tiles, 4>() + sum_of<Tiles, 5>();
}

double fp32_peak() { return peak_avx512.fp32(); }

}  // namespace

constinit const PeakLoops peak_amx = {fp32_peak, bf16_peak<HardwareTiles>};
constinit const PeakLoops peak_amx_emulated = {fp32_peak, bf16_peak<EmulatedTiles>};
}  // namespace kdfast::cpu
