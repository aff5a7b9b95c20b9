// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use: chosen at import, forced by KDFAST_CPU_ISA or
// set_isa().
#pragma once
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace kdfast::cpu {

// What this CPU can run, in rising order of preference; `generic` is always first.
std::vector<Isa> available_isas();
// The same and amx_emulated, which is for tests and never chosen by itself.
std::vector<Isa> testable_isas();
// Takes KDFAST_CPU_ISA, or the best set if it is not set. Throws as set_isa does.
void choose_isa();
// Throws std::invalid_argument for a name that is unknown or that this CPU cannot run.
void set_isa(const std::string& name);
// The instruction set of that name; throws as set_isa does.
Isa runnable_isa(const std::string& name);
const char* isa_name(Isa isa);
// Vendor, family, model and stepping of an x86 CPU as cpuid has them; elsewhere an empty vendor.
std::tuple<std::string, int, int, int> cpu_signature();

}  // namespace kdfast::cpu
