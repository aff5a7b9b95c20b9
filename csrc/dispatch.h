// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use: chosen once, forced by KDFAST_CPU_ISA or set_isa().
#pragma once
#include <string>
#include <vector>

namespace kdfast::cpu {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx };

// In rising order of preference; `generic` is always first.
std::vector<Isa> available_isas();
Isa isa();
// Throws std::invalid_argument for a name that is unknown or that this CPU cannot run.
void set_isa(const std::string& name);
const char* isa_name(Isa isa);

}  // namespace kdfast::cpu
