// SPDX-License-Identifier: Apache-2.0
// Loops of multiply-adds on registers alone: the rate that no kernel and no library can exceed.
//
// They multiply ones by ones and add to sums that start at zero, so that the sums count the
// multiply-adds, exactly in fp32. A call takes 50 to 300 us.
#pragma once

namespace kdfast::cpu {

// The fastest loops of an instruction set; both return the multiply-adds that were done.
struct PeakLoops {
  double (*fp32)();
  double (*bf16)();  // that of fp32 where there are no instructions for bf16
};

extern const PeakLoops peak_generic, peak_avx2, peak_avx512, peak_avx512_bf16;
extern const PeakLoops peak_amx, peak_amx_emulated;

}  // namespace kdfast::cpu
