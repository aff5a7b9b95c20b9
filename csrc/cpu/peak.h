// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <utility>

namespace kdfast::cpu {

// Runs a loop of isa/peak.h on as many threads as torch uses, until each has had `seconds` of CPU
// time. Returns the floating-point operations that were done, two a multiply-add, and the rate: the
// sum of the threads' own rates by CPU time. Throws as set_isa does.
std::pair<double, double> run_peak(const std::string& isa, bool bf16, double seconds);

}  // namespace kdfast::cpu
