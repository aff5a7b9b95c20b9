// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kdfast::cpu {
namespace {

constexpr Isa kAll[] = {Isa::generic,     Isa::avx2, Isa::avx512,
                        Isa::avx512_bf16, Isa::amx,  Isa::amx_emulated};

#if defined(__x86_64__)
struct Cpuid {
  unsigned a, b = 0, c = 0, d = 0;
  explicit Cpuid(unsigned leaf) : a(leaf) {
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  }
};

// F16C is asked for by hand: not every compiler's builtin knows it.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (Cpuid(1).c >> 29 & 1);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx_bf16() {
  const unsigned d = Cpuid(7).d;
  const bool cpu = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16 and AMX-TILE
#if defined(__linux__)
  // The kernel grants the 8 KiB of tile state per process and on request only.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return cpu && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return has_avx2();
    case Isa::avx512: return has_avx512();
    case Isa::avx512_bf16:
    case Isa::amx_emulated: return has_avx512_bf16();
    case Isa::amx: return has_avx512_bf16() && has_amx_bf16();
  }
#endif
  return isa == Isa::generic;
}

}  // namespace

Isa runnable_isa(const std::string& name) {
  std::string known;
  for (const Isa isa : kAll) {
    if (name == isa_name(isa)) {
      if (supported(isa)) return isa;
      throw std::invalid_argument("KDFAST_CPU_ISA: this CPU cannot run " + name);
    }
    known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("KDFAST_CPU_ISA: must be one of " + known + ", got " + name);
}

std::vector<Isa> testable_isas() {
  std::vector<Isa> out;
  for (const Isa isa : kAll)
    if (supported(isa)) out.push_back(isa);
  return out;
}

std::vector<Isa> available_isas() {
  std::vector<Isa> out = testable_isas();
  std::erase(out, Isa::amx_emulated);
  return out;
}

void choose_isa() {
  const char* forced = std::getenv("KDFAST_CPU_ISA");
  use_kernels(forced && *forced ? runnable_isa(forced) : available_isas().back());
}

void set_isa(const std::string& name) { use_kernels(runnable_isa(name)); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
    case Isa::amx_emulated: return "amx_emulated";
    default: return "generic";
  }
}

std::tuple<std::string, int, int, int> cpu_signature() {
#if defined(__x86_64__)
  const Cpuid names(0), version(1);
  std::string vendor;
  for (const unsigned letters : {names.b, names.d, names.c})
    vendor.append(reinterpret_cast<const char*>(&letters), sizeof(letters));
  // The extended fields count for the highest family (AMD, Intel), the model's for Intel's 6 too.
  int family = version.a >> 8 & 15, model = version.a >> 4 & 15;
  if (family == 15 || family == 6) model += (version.a >> 16 & 15) << 4;
  if (family == 15) family += version.a >> 20 & 255;
  return {vendor, family, model, version.a & 15};
#else
  return {};
#endif
}

}  // namespace kdfast::cpu
