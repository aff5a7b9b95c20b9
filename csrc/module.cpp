// SPDX-License-Identifier: Apache-2.0
// Module init: loading it registers the ops; the functions below are about the CPU and the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "cpu/dispatch.h"
#include "cpu/peak.h"

namespace {

std::vector<std::string> names(const std::vector<kdfast::cpu::Isa>& isas) {
  std::vector<std::string> out;
  for (const auto isa : isas) out.push_back(kdfast::cpu::isa_name(isa));
  return out;
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", KDFAST_COMPILER},
          {"torch", KDFAST_TORCH_VERSION},
          {"cuda", KDFAST_CUDA_VERSION},
          {"cuda_archs", KDFAST_CUDA_ARCHS}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def(
      "available_isas", [] { return names(kdfast::cpu::available_isas()); },
      "CPU instruction sets that can run here, best last.");
  m.def(
      "testable_isas", [] { return names(kdfast::cpu::testable_isas()); },
      "The same, and those that are emulated for tests.");
  m.def(
      "cpu_isa", [] { return std::string(kdfast::cpu::isa_name(kdfast::cpu::kernels().isa)); },
      "The instruction set that the CPU kernels use.");
  m.def("set_cpu_isa", &kdfast::cpu::set_isa, pybind11::arg("name"),
        "Forces an instruction set; ValueError if unknown or not supported here.");
  m.def("cpu_signature", &kdfast::cpu::cpu_signature,
        "Vendor, family, model and stepping by cpuid; an empty vendor where the CPU has none.");
  m.def("run_peak", &kdfast::cpu::run_peak, pybind11::arg("isa"), pybind11::arg("bf16"),
        pybind11::arg("seconds"), pybind11::call_guard<pybind11::gil_scoped_release>(),
        "FLOP done by a loop on registers on torch's threads, and their rate by CPU time.");
  m.def("build_info", &build_info, "Compiler, torch and CUDA that this extension was built with.");
  kdfast::cpu::choose_isa();  // a bad KDFAST_CPU_ISA fails at import, not in the first kernel
}
