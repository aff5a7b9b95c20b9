# SPDX-License-Identifier: Apache-2.0
"""Where the time of a kdfast op goes on this CPU: `python -m bench.profile_cpu [--save FILE]`.

One thread runs a case of the benchmarks while `perf` (Linux tools; no privileges, no hardware
counters) samples which function it is in. The functions are sorted into products, softmax rows,
packing and so on. A wait for memory counts for the function that waits. "of limit" is the rate of
the products alone over the peak of the CPU for the dtype (`kdfast.machine.peak`), which the file
holds beside the rates of the libraries; for losses, a plain copy of the same bytes over the time of
all. Times are of the CPU, so other processes disturb them less.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import (
    bench_attention_distill,
    bench_feature_loss,
    bench_kd_loss,
    bench_linear_kd_loss,
    bench_orion,
    bench_pruned_attention,
)
from bench.rows import text as result_file
from kdfast.machine import facts
from kdfast.machine.peak import library_rates, peak_flops

CPU, BF16 = torch.device("cpu"), torch.bfloat16
attention = bench_pruned_attention.bench_attention
bias = bench_pruned_attention.bench_bias
CASES: dict[str, Callable[..., Any]] = {
    "fwd 197": partial(attention, shape=(8, 12, 197), dtype=BF16, phase="fwd"),
    "197": partial(attention, shape=(8, 12, 197), dtype=BF16, phase="fwd+bwd"),
    "257": partial(attention, shape=(8, 8, 257), dtype=BF16, phase="fwd+bwd"),
    "1600": partial(attention, shape=(1, 8, 1600), dtype=BF16, phase="fwd+bwd"),
    "fp32 197": partial(attention, shape=(8, 12, 197), dtype=torch.float32, phase="fwd+bwd"),
    "windows": partial(bench_pruned_attention.bench_orion_windows, dtype=BF16, phase="fwd+bwd"),
    "swin": partial(bias, name="swin stage 1", dtype=BF16, phase="fwd+bwd"),
    "beit": partial(bias, name="beit", dtype=BF16, phase="fwd+bwd"),
    "distill": partial(bench_attention_distill.bench_kl, shape=(8, 8, 257), dtype=BF16),
    "kd": partial(bench_kd_loss.bench_forward_backward, shape=(4096, 1000), dtype=BF16),
    "feature": partial(
        bench_feature_loss.bench_forward_backward, kind="mse", normalize="channel", dtype=BF16
    ),
    "linear kd": partial(
        bench_linear_kd_loss.bench_forward_backward, shape=(1024, 1000, 768), dtype=BF16
    ),
    "eva": partial(bench_orion.bench_forward, dtype=BF16, depth=3),
    "eva step": partial(bench_orion.bench_distillation, dtype=BF16, depth=3),
}
# The first pattern that a function's library and name fit says what it does.
KINDS = {
    "products": r"\btile<|::block<|gemm|JIT|\[anon\]|//anon|perf-\d+|sgemv|mkl_blas",
    "softmax": r"weigh|probabilities|columns|StripRow|ColumnKernel|DistillTiles|expf|logf|entropy",
    "packing": r"pack|to_lanes|to_pairs|transpose16|turn_bias",
    "stores": r"store_row|backward_keys|apply|attention_kernel",
    "rows": r"one_row|rows_of|forward_rows|backward_rows|add_up|write_gradient|channel_sums",
    "torch": r"libtorch|libc10",
    "allocation": r"kernel|libc\.|memset|memcpy",
}
SECONDS, HERTZ = 3.0, 1999


class Captured:
    """Takes the place of the fixture ``compare``, and keeps kdfast's call once it is checked."""

    device = CPU

    def __call__(
        self, op: str, name: str, calls: dict[str, Any], *, check: Any = None, **limits: Any
    ) -> None:
        if check:
            check("kdfast", calls["kdfast"])
        self.found = f"{op} {name.replace('torch.', '')}", calls["kdfast"], limits


def captured(case: Callable[..., Any]) -> tuple[str, Callable[[], object], dict[str, Any]]:
    """Name, kdfast's call and the limits of a benchmark, which checks results but times nothing."""
    compare = Captured()
    case(compare)
    return compare.found


def best(call: Callable[[], object]) -> float:
    """Seconds of CPU of the fastest of some calls: what others do on the machine counts little."""
    times = []
    for _ in range(15):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def sampled(call: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Seconds of CPU per call, and the share of the samples in each "library;function"."""
    call()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "samples")
        command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(HERTZ), "-o", file]
        command += ["-p", str(os.getpid()), "--", "sleep", str(SECONDS)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as perf:
            times = []
            while perf.poll() is None:
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
            if perf.returncode:
                raise RuntimeError(f"perf: must sample this process, got {perf.communicate()[1]}")
        command = ["perf", "report", "-i", file, "--stdio", "-q", "-t", ";", "-F"]
        command += ["overhead,dso,sym", "--percent-limit", "0"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, float] = {}
    for line in report.splitlines():
        if row := re.match(r" *([0-9.]+)% *;(.*)", line):
            name = re.sub(r" +|kdfast::cpu::|\(anonymous namespace\)::", " ", row[2])
            functions[name] = functions.get(name, 0.0) + float(row[1]) / 100
    return min(times), functions


def kind_of(function: str) -> str:
    """What a function does, by ``KINDS``."""
    return next((kind for kind, name in KINDS.items() if re.search(name, function)), "other")


def measured_rates() -> dict[str, dict[str, float]]:
    """For each dtype the peak and what the libraries reach, in GFLOP/s of one thread."""
    rates = {}
    for dtype in (torch.float32, BF16):
        found = {"peak": peak_flops(dtype, threads=1)} | library_rates(dtype)
        rates[str(dtype)] = {name: rate / 1e9 for name, rate in found.items()}
    return rates


def profile(case: Callable[..., Any], rates: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One row of the result file."""
    name, call, limits = captured(case)
    seconds, functions = sampled(call)
    total = sum(functions.values())
    shares = dict.fromkeys((*KINDS, "other"), 0.0)
    for function, share in functions.items():
        shares[kind_of(function)] += share / total
    row = {"case": name, "ms": 1e3 * seconds, "shares": shares, "of_limit": None}
    if "flops" in limits and shares["products"]:
        limit = limits["flops"] / (1e9 * rates[str(limits["dtype"])]["peak"])
        row["of_limit"] = limit / (seconds * shares["products"])
    elif "nbytes" in limits:
        to, source = torch.empty(2, limits["nbytes"] // 2, dtype=torch.uint8)
        row["of_limit"] = best(lambda: to.copy_(source)) / seconds
    top = sorted(functions.items(), key=lambda item: -item[1])[:8]
    row["functions"] = {function[:160]: round(share / total, 4) for function, share in top}
    return row


def text(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    kinds = [*KINDS, "other"]
    lines = [f"| case | ms | {' | '.join(kinds)} | of limit |", "| --- " * (len(kinds) + 3) + "|"]
    for row in rows:
        shares = " | ".join(f"{row['shares'][kind]:.0%}" for kind in kinds)
        limit = "" if row["of_limit"] is None else f"{row['of_limit']:.0%}"
        lines.append(f"| {row['case']} | {row['ms']:.2f} | {shares} | {limit} |")
    return "\n".join(lines)


def main() -> None:
    """Profiles the named cases, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--save", metavar="FILE", type=Path)
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"cases must be some of {list(CASES)}, got {sorted(unknown)}")
    if shutil.which("perf") is None:
        parser.error("perf must be on the path (Debian: linux-perf)")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.compiler.set_stance("force_eager")  # only kdfast is profiled
    rates = measured_rates()
    for dtype, found in rates.items():
        print(f"{dtype}:", ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in found.items()))
    rows = [profile(CASES[name], rates) for name in options.cases or CASES]
    print(text(rows))
    if options.save:
        written = {"machine": facts.machine_facts(), "rates": rates, "rows": rows}
        options.save.write_text(result_file(written), encoding="utf-8")


if __name__ == "__main__":
    main()
