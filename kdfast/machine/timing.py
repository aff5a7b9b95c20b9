# SPDX-License-Identifier: Apache-2.0
"""Times candidates in turns, and tells samples on a quiet machine from others."""

import bisect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.ops._library import EXTENSION

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


def timed_sample(call: Candidate, repeats: int) -> tuple[float, bool]:
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
        """Seconds of a loop now: the faster of two, since a late thread is no slow window."""
        found = min(self._loop(), self._loop())
        bisect.insort(self._found, found)
        return found


def inference_calls(
    models: Mapping[str, nn.Module],
    image: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Candidate]:
    """Calls of models without gradients, by name, such as ``interleave`` takes.

    Args:
        models: In eval mode, on the image's device.
        image: What every call gets.
        autocast: Gives the context that the precision asks for.
    """

    def call(model: nn.Module) -> Candidate:
        def forward() -> object:
            with torch.inference_mode(), autocast():
                return model(image)

        return forward

    return {name: call(model) for name, model in models.items()}


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int = 15,
    least: int = FEW,
    repeats: int | Mapping[str, int] | None = None,
    warmup: int = 2,
    seconds: float | None = None,
    calibration: Calibration | None = None,
) -> dict[str, list[tuple[float, bool]]]:
    """Times all candidates in alternating rounds, so that drift of the machine hits all alike.

    Args:
        candidates: Name to a call without arguments.
        rounds: Samples per candidate.
        least: Samples of each that are taken however long it takes.
        repeats: Calls of a sample, of all or by name, without warm-up; None: ``calls_per_sample``.
        warmup: Calls of each before the first sample; one of them if it takes long.
        seconds: After this time no round is begun, if ``least`` samples of each are there.
        calibration: Tells slow windows of the machine; None: only foreign load counts.

    Returns:
        Name to (seconds per call, was it a fast sample) per round: the cores were ours, and the
        calibration loops before and after ran within SLOW of the best.
    """
    if repeats is None:
        repeats = {name: calls_per_sample(call, warmup) for name, call in candidates.items()}
    elif isinstance(repeats, int):
        repeats = dict.fromkeys(candidates, repeats)
    taken: dict[str, list[tuple[float, bool, float]]] = {name: [] for name in candidates}
    order: Sequence[str] = list(candidates)
    loop = calibration.seconds if calibration else lambda: 0.0
    started, before = time.monotonic(), loop()
    for done in range(rounds):
        if seconds is not None and done >= least and time.monotonic() - started > seconds:
            break
        for name in order:
            sample, quiet = timed_sample(candidates[name], repeats[name])
            after = loop()
            taken[name].append((sample, quiet, max(before, after)))
            before = after
        # Not reversed: the first and the last would follow themselves, on warm caches.
        order = [*order[1:], order[0]]
    limit = SLOW * calibration.best if calibration else 0.0
    return {n: [(s, quiet and around <= limit) for s, quiet, around in t] for n, t in taken.items()}


def calls_per_sample(call: Candidate, warmup: int = 2) -> int:
    """Warms up, and says how many calls take SAMPLE_SECONDS; 1 if one takes longer."""
    for _ in range(warmup):
        if timed_sample(call, 1)[0] > LONG_SECONDS:
            return 1
    return max(1, round(SAMPLE_SECONDS / max(timed_sample(call, 1)[0], 1e-7)))


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
