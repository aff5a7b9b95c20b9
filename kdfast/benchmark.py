# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing of candidates, memory counting, and the machine facts of a result file."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kdfast._version import __version__
from kdfast.ops._library import EXTENSION
from kdfast.testing import DRY_RUN

Candidate = Callable[[], object]
# A sample is quiet when other processes used less than this share of one core during it.
QUIET_SHARE = 0.08
SAMPLE_SECONDS = 0.05


@dataclass
class Row:
    """One candidate of one comparison; times in milliseconds."""

    op: str
    case: str
    candidate: str
    ms: float  # median of quiet samples, of all samples if fewer than five are quiet
    ms_all: float
    iqr: float
    samples: int
    quiet: int
    gb_s: float | None = None
    gflop_s: float | None = None
    limit_ms: float | None = None
    limit_share: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None


@dataclass
class Results:
    """Machine, versions and rows of one session, as written to ``bench/results``."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # what was not timed, and why

    def to_json(self) -> dict[str, Any]:
        """Plain containers for ``json.dump``."""
        rows = [asdict(row) for row in self.rows]
        return {"machine": self.machine, "rows": rows, "left_out": self.left_out}


T = TypeVar("T")


def sized(full: T, tiny: T) -> T:
    """The cases of a benchmark: ``tiny`` ones in a dry run, whose times mean nothing."""
    return tiny if DRY_RUN else full


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a candidate for the shapes it is called with.

    What was compiled before is forgotten: after eight shapes of one function torch would run the
    ninth uncompiled. In a dry run nothing is compiled.
    """
    if DRY_RUN:
        return function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def machine_facts() -> dict[str, Any]:
    """CPU or GPU name, ISA, threads, versions and the commit of the code that runs."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "gpu": gpu,
        "isa": EXTENSION.cpu_isa() if EXTENSION else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kdfast": __version__,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*args: str) -> str | None:
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds used by the whole machine and by this process."""
    stat = Path("/proc/stat")
    own = time.process_time()
    if not stat.exists():
        return own, own
    # user nice system idle iowait irq softirq steal, in ticks of 10 ms
    ticks = [int(t) for t in stat.read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / 100, own


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(call: Candidate, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def _cuda_seconds(call: Candidate, repeats: int) -> float:
    """By events on the stream: launches that the CPU makes in time are not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _sync()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    _sync()
    return start.elapsed_time(end) / 1e3


def _sample(call: Candidate, repeats: int) -> tuple[float, bool]:
    """Seconds per call over ``repeats`` calls, and whether the machine was quiet meanwhile."""
    machine, own = _cpu_seconds()
    seconds = _cuda_seconds(call, repeats) if torch.cuda.is_available() else _seconds(call, repeats)
    machine_after, own_after = _cpu_seconds()
    foreign = (machine_after - machine) - (own_after - own)
    # /proc/stat counts in 10 ms ticks, so short samples need that much slack.
    return seconds / repeats, foreign < QUIET_SHARE * seconds + 0.02


def interleave(
    candidates: Mapping[str, Candidate], *, rounds: int = 15, warmup: int = 2
) -> dict[str, list[tuple[float, bool]]]:
    """Times all candidates in alternating rounds, so that drift of the machine hits all alike.

    Args:
        candidates: Name to a call without arguments.
        rounds: Samples per candidate.
        warmup: Calls of each before the first sample.

    Returns:
        Name to (seconds per call, was the machine quiet) per round.
    """
    repeats = dict.fromkeys(candidates, 1)
    for name, call in {} if DRY_RUN else candidates.items():
        for _ in range(warmup):
            call()
        repeats[name] = max(1, round(SAMPLE_SECONDS / max(_sample(call, 1)[0], 1e-7)))
    samples: dict[str, list[tuple[float, bool]]] = {name: [] for name in candidates}
    order: Sequence[str] = list(candidates)
    for _ in range(rounds):
        for name in order:
            samples[name].append(_sample(candidates[name], repeats[name]))
        order = order[::-1]
    return samples


def summarize(samples: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Medians of quiet and of all samples, and the spread, in milliseconds."""
    every = [1e3 * seconds for seconds, _ in samples]
    quiet = [1e3 * seconds for seconds, calm in samples if calm]
    used = quiet if len(quiet) >= 5 else every
    quarter = statistics.quantiles(used, n=4) if len(used) > 1 else [used[0]] * 3
    return {
        "ms": statistics.median(used),
        "ms_all": statistics.median(every),
        "iqr": quarter[2] - quarter[0],
        "samples": len(every),
        "quiet": len(quiet),
    }


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes that autograd keeps for backward during ``call``, each storage counted once."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(seen.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """Highest extra memory that tensors held at one time during ``call``, in bytes.

    On CUDA the allocator's own counter; on the CPU the allocation events of torch's profiler, so
    scratch that a kernel takes outside torch's allocator is not counted.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        _sync()
        return torch.cuda.max_memory_allocated() - before
    # The profiler's library would write its own log to the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def copy_seconds(device: torch.device, nbytes: int) -> float:
    """Best of seven plain copies that read and write ``nbytes`` in all: the limit of moving them.

    The size matters: what fits in a cache moves several times faster than what does not.
    """
    src = torch.ones(max(1, nbytes // 2), dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    repeats = max(1, (1 << 24) // max(nbytes, 1))
    return min(_sample(lambda: dst.copy_(src), repeats)[0] for _ in range(7))


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP per second of the best of seven square matrix products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(_sample(lambda: a @ b, 3)[0] for _ in range(7))
    return 2 * size**3 / best
