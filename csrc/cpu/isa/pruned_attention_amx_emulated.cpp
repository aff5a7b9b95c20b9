// SPDX-License-Identifier: Apache-2.0
// The kernel for AMX on AVX-512 in place of the tiles: for tests, slower than the one without
// tiles.
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/pruned_attention_kernel.h"

namespace kdfast::cpu {

AttentionKernel<float> attention_amx_emulated() {
  return attention_kernel<Bf16, AmxTiles<EmulatedTiles>>();
}

}  // namespace kdfast::cpu
