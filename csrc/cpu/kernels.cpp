// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels.h"

#include <atomic>

namespace kdfast::cpu {
namespace {

// In the order of Isa; attention kernels by Products: fp32, split, bf16. An instruction set without
// a kernel of its own takes the one of the set below it. Only in tiles are split products, three
// instead of one, faster than fp32.
constinit const Kernels kTables[] = {
    {Isa::generic,
     {&attention_generic, &attention_generic, &attention_generic},
     &rows_generic,
     &peak_generic},
#if KDFAST_X86
    {Isa::avx2, {&attention_avx2, &attention_avx2, &attention_avx2}, &rows_avx2, &peak_avx2},
    {Isa::avx512,
     {&attention_avx512, &attention_avx512, &attention_avx512},
     &rows_avx512,
     &peak_avx512},
    {Isa::avx512_bf16,
     {&attention_avx512, &attention_avx512, &attention_avx512_bf16},
     &rows_avx512,
     &peak_avx512_bf16},
    {Isa::amx, {&attention_avx512, &attention_amx_split, &attention_amx}, &rows_avx512, &peak_amx},
    {Isa::amx_emulated,
     {&attention_avx512, &attention_amx_emulated_split, &attention_amx_emulated},
     &rows_avx512,
     &peak_amx_emulated},
#endif
};

// Until module.cpp has chosen: kernels that any CPU runs.
constinit std::atomic<const Kernels*> current{&kTables[0]};

}  // namespace

const Kernels& kernels() { return *current.load(std::memory_order_relaxed); }

const Kernels& kernels_of(Isa isa) { return kTables[static_cast<int>(isa)]; }

void use_kernels(Isa isa) { current.store(&kernels_of(isa), std::memory_order_relaxed); }

}  // namespace kdfast::cpu
