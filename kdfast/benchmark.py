# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing of candidates, memory counting, and the machine facts of a result file."""

import bisect
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
SAMPLE_SECONDS = 0.03
# A call that takes longer than this warms up once, not twice.
LONG_SECONDS = 0.2
# A calibration loop this much slower than the session's fastest twentieth marks a slow window:
# machines with two speeds differ by 2, and a loop after other work by up to 1.3.
SLOW = 1.5
CALIBRATION_SECONDS = 4e-4
# With fewer fast samples a row's time is the median of all of them, and says so.
FEW = 5


@dataclass
class Row:
    """One candidate of one comparison; times in milliseconds."""

    op: str
    case: str
    candidate: str
    ms: float  # median of the fast samples, of all samples if fewer than FEW are fast
    ms_all: float
    iqr: float
    samples: int
    fast: int
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
    cases: dict[str, float] = field(default_factory=dict)  # seconds of a benchmark, all in all

    def to_json(self) -> dict[str, Any]:
        """Plain containers for ``json.dump``."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Results":
        """Inverse of ``to_json``."""
        rows = [Row(**row) for row in found["rows"]]
        return cls(found["machine"], rows, found["left_out"], found["cases"])


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


def _timed(call: Candidate, repeats: int) -> float:
    return (_cuda_seconds if torch.cuda.is_available() else _seconds)(call, repeats)


def _sample(call: Candidate, repeats: int) -> tuple[float, bool]:
    """Seconds per call over ``repeats`` calls, and whether the machine was quiet meanwhile."""
    machine, own = _cpu_seconds()
    seconds = _timed(call, repeats)
    machine_after, own_after = _cpu_seconds()
    foreign = (machine_after - machine) - (own_after - own)
    # /proc/stat counts in 10 ms ticks, so short samples need that much slack.
    return seconds / repeats, foreign < QUIET_SHARE * seconds + 0.02


class Calibration:
    """A matrix product that stays in the caches, timed around every sample.

    Some machines run at two speeds and change between them many times a second, with nobody else
    on them. The product runs on the threads of the candidates and on the matrix units where the
    CPU has some, so it is slow when they are.

    Attributes:
        best: Seconds of the fastest twentieth of the loops so far; the very fastest is a lucky one.
    """

    def __init__(self, device: torch.device) -> None:
        units = device.type == "cuda" or (EXTENSION is not None and EXTENSION.cpu_isa() == "amx")
        size = 2048 if device.type == "cuda" else 512 if units else 256
        dtype = torch.bfloat16 if units else torch.float32
        self._a, self._b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        self._repeats = 1
        fastest = min(self._loop() for _ in range(20))
        self._repeats = max(1, round(CALIBRATION_SECONDS / fastest))
        self._found = sorted(self._loop() for _ in range(20))

    @property
    def best(self) -> float:
        return self._found[len(self._found) // 20]

    def _loop(self) -> float:
        return _timed(lambda: self._a @ self._b, self._repeats)

    def seconds(self) -> float:
        """Of one loop, now: the faster of two, as a thread that wakes up late is no slow window."""
        found = min(self._loop(), self._loop())
        bisect.insort(self._found, found)
        return found


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int = 15,
    warmup: int = 2,
    seconds: float | None = None,
    calibration: Calibration | None = None,
) -> dict[str, list[tuple[float, bool]]]:
    """Times all candidates in alternating rounds, so that drift of the machine hits all alike.

    Args:
        candidates: Name to a call without arguments.
        rounds: Samples per candidate.
        warmup: Calls of each before the first sample; one of them if it takes long.
        seconds: After this time no round is begun, if FEW samples of each are there.
        calibration: Tells slow windows of the machine; None: only foreign load counts.

    Returns:
        Name to (seconds per call, was it a fast sample) per round: the cores were ours, and the
        calibration loops before and after ran within SLOW of the best.
    """
    repeats = {} if DRY_RUN else {n: _repeats(call, warmup) for n, call in candidates.items()}
    taken: dict[str, list[tuple[float, bool, float]]] = {name: [] for name in candidates}
    order: Sequence[str] = list(candidates)
    loop = calibration.seconds if calibration else lambda: 0.0
    started, before = time.monotonic(), loop()
    for done in range(rounds):
        if seconds is not None and done >= FEW and time.monotonic() - started > seconds:
            break
        for name in order:
            sample, quiet = _sample(candidates[name], repeats.get(name, 1))
            after = loop()
            taken[name].append((sample, quiet, max(before, after)))
            before = after
        # Not reversed: the first and the last would follow themselves, on warm caches.
        order = [*order[1:], order[0]]
    limit = SLOW * calibration.best if calibration else 0.0
    return {n: [(s, quiet and around <= limit) for s, quiet, around in t] for n, t in taken.items()}


def _repeats(call: Candidate, warmup: int) -> int:
    """Warms up, and says how often a sample should call."""
    for _ in range(warmup):
        if _sample(call, 1)[0] > LONG_SECONDS:
            return 1
    return max(1, round(SAMPLE_SECONDS / max(_sample(call, 1)[0], 1e-7)))


def summarize(samples: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Medians of the fast and of all samples, and the spread, in milliseconds."""
    every = [1e3 * seconds for seconds, _ in samples]
    fast = [1e3 * seconds for seconds, good in samples if good]
    used = fast if len(fast) >= FEW else every
    quarter = statistics.quantiles(used, n=4) if len(used) > 1 else [used[0]] * 3
    return {
        "ms": statistics.median(used),
        "ms_all": statistics.median(every),
        "iqr": quarter[2] - quarter[0],
        "samples": len(every),
        "fast": len(fast),
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


def peak_bytes(call: Callable[[], object], device: torch.device | None = None) -> int:
    """Highest extra memory that tensors held at one time during ``call``, in bytes.

    On CUDA the allocator's own counter; on the CPU the allocation events of torch's profiler, so
    scratch that a kernel takes outside torch's allocator is not counted.

    Args:
        call: What is measured.
        device: Whose memory; None: the GPU's where there is one.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
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


def memory_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """``peak_bytes`` and ``saved_bytes`` of one and the same call."""
    saved: list[int] = []
    return peak_bytes(lambda: saved.append(saved_bytes(call))), saved[0]


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
