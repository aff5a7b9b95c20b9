// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use: chosen once, forced by KDFAST_CPU_ISA or set_isa().
#pragma once
#include <string>
#include <vector>

namespace kdfast::cpu {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx, amx_emulated };

// What this CPU can run, in rising order of preference; `generic` is always first.
std::vector<Isa> available_isas();
// The same and amx_emulated, which is for tests and never chosen by itself.
std::vector<Isa> testable_isas();
Isa isa();
// Throws std::invalid_argument for a name that is unknown or that this CPU cannot run.
void set_isa(const std::string& name);
const char* isa_name(Isa isa);

}  // namespace kdfast::cpu
