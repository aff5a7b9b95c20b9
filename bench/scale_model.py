# SPDX-License-Identifier: Apache-2.0
"""Step times, bytes and hours on many GPUs, from counted work and stated assumptions.

Nothing here was run on a GPU; docs/scale.md says what is measured and what is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.scale_settings import Assumptions, Setting
from kdfast.trainer.exchange import BUCKET

SLOW, FAST = 0, 1
CASES = (SLOW, FAST)
# Bytes that AdamW reads and writes for a parameter: four fp32 numbers in, three out.
ADAMW_BYTES = 28
# PowerSGD leaves a matrix as it is unless it gets smaller by this factor (torch's default).
LEAST_COMPRESSION = 2
SAVE_EVERY = 500
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of one case, in seconds on each GPU.

    Attributes:
        gpus: Number of GPUs.
        batch: Pictures of a GPU.
        compute: Products, and the optimizer's passes over its states.
        reduce: The all-reduce of the gradients, as if nothing hid it.
        exposed: What the backward does not hide of it.
        launch: What a step takes at least, as Python has to launch it.
        data: Loading the pictures on the cores of a GPU.
    """

    gpus: int
    batch: int
    compute: float
    reduce: float
    exposed: float
    launch: float
    data: float

    @property
    def seconds(self) -> float:
        """The whole step: loading and launching run beside the GPU."""
        return max(self.compute + self.exposed, self.launch, self.data)

    @property
    def pictures(self) -> float:
        """Pictures a second of a GPU."""
        return self.batch / self.seconds

    @property
    def limit(self) -> str:
        """What has most of the time."""
        gpu = self.compute + self.exposed
        if self.data >= max(gpu, self.launch):
            return "loading"
        if self.launch > gpu:
            return "launches"
        return "all-reduce" if self.exposed > self.compute else "compute"


def batch_of(setting: Setting, inputs: Inputs, gpus: int, *, cached: bool = False) -> int:
    """Pictures of a GPU: what fits, or what the recipe's largest step leaves for each."""
    name = "plans_cached" if cached else "plans"
    fits: int = inputs["work"][setting.work][name][-1]["batch"]
    return max(1, min(fits, setting.limit // gpus))


def step_of(
    setting: Setting,
    inputs: Inputs,
    chosen: Assumptions,
    gpus: int,
    case: int,
    *,
    cached: bool = False,
    gradient: int | None = None,
) -> Step:
    """The step of a training.

    Args:
        setting: The training.
        inputs: Of ``bench.scale_measure``.
        chosen: What is assumed.
        gpus: Number of GPUs.
        case: ``SLOW`` or ``FAST``.
        cached: Without the teacher, whose outputs are on disk.
        gradient: Bytes of the gradient that are sent; None: all in fp32.
    """
    work = inputs["work"][setting.work]
    batch = batch_of(setting, inputs, gpus, cached=cached)
    flops = work["step_cached"] if cached else work["step"]
    rate = chosen.tflops * 1e12 * chosen.share[case]
    teacher = 0 if cached else work["teacher_forward"]
    backward = batch * (flops - teacher - work["student_forward"]) / rate
    optimizer = ADAMW_BYTES * work["trained_params"] / (chosen.hbm * 1e9 * chosen.hbm_share[case])
    sent = 4 * work["trained_params"] if gradient is None else gradient
    reduce = reduce_seconds(sent, chosen, gpus, case)
    last = min(reduce, reduce / max(1, math.ceil(sent / BUCKET)))
    data = batch * inputs["data"][setting.data]["cpu_ms"] / 1e3 / chosen.cores[case]
    if cached:
        data += batch * row_of(inputs, None)["cpu_us"] / 1e6
    return Step(
        gpus=gpus,
        batch=batch,
        compute=batch * flops / rate + optimizer,
        reduce=reduce,
        exposed=max(last, reduce - chosen.overlap[case] * backward),
        launch=chosen.launch_ms[case] / 1e3,
        data=data,
    )


def reduce_seconds(size: int, chosen: Assumptions, gpus: int, case: int) -> float:
    """All-reduce of so many bytes: rings over all links of a node, and messages between nodes."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / chosen.node)
    link = chosen.nvlink
    if nodes > 1:
        # Each of a node's rings leaves it by the network of another of its GPUs.
        link = min(link, chosen.node * chosen.network)
    # The buckets, and one word of all processes about how the step went.
    messages = (math.ceil(size / BUCKET) + 1) * (1 + 2 * math.ceil(math.log2(nodes)))
    moved = 2 * (gpus - 1) / gpus * size / (link * 1e9 * chosen.link_share[case])
    return moved + messages * chosen.hop_us[case] / 1e6


def steps_of(setting: Setting, step: Step) -> int:
    """Steps of an epoch; a last one that is not full is left out."""
    return setting.pictures // (step.batch * step.gpus)


def hours(setting: Setting, step: Step, epochs: int) -> float:
    """Of all epochs, without evaluation and checkpoints."""
    return steps_of(setting, step) * epochs * step.seconds / 3600


def efficiency(
    setting: Setting, inputs: Inputs, chosen: Assumptions, gpus: int, case: int
) -> float:
    """Pictures a second of a GPU, over those of a GPU alone."""
    one, many = (step_of(setting, inputs, chosen, n, case).pictures for n in (1, gpus))
    return many / one


def stops(setting: Setting, inputs: Inputs, chosen: Assumptions, case: int) -> Step | None:
    """The step on the first power of two of GPUs that are used to less than half; None: none is."""
    for power in range(13):
        gpus = 2**power
        if gpus > setting.limit:
            return None
        if efficiency(setting, inputs, chosen, gpus, case) < 0.5:
            return step_of(setting, inputs, chosen, gpus, case)
    return None


def sgd_bytes(shapes: Iterable[tuple[list[int], int]], rank: int) -> int:
    """Bytes of a gradient after torch's PowerSGD hook: fp32 factors P and Q of each matrix."""
    total = 0
    for shape, count in shapes:
        rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
        small = (rows + columns) * rank
        smaller = len(shape) > 1 and small * LEAST_COMPRESSION < rows * columns
        total += 4 * count * (small if smaller else rows * columns)
    return total


def row_of(inputs: Inputs, top_k: int | None) -> dict[str, Any]:
    """The measured cache with so many classes."""
    found: dict[str, Any] = next(row for row in inputs["cache"] if row["top_k"] == top_k)
    return found


def fill_hours(
    setting: Setting, inputs: Inputs, chosen: Assumptions, gpus: int, case: int
) -> float:
    """One variant of the teacher's outputs for all pictures, by all GPUs."""
    work, data = inputs["work"][setting.work], inputs["data"][setting.data]
    compute = work["teacher_forward"] / (chosen.tflops * 1e12 * chosen.share[case])
    loading = data["cpu_ms"] / 1e3 / chosen.cores[case]
    return setting.pictures / gpus * max(compute, loading) / 3600


def move_seconds(
    setting: Setting, inputs: Inputs, chosen: Assumptions, gpus: int, top_k: int | None, case: int
) -> float:
    """One process moves what all others wrote of a cache: it reads, checks and writes each row."""
    row = row_of(inputs, top_k)
    moved = setting.pictures * (1 - 1 / gpus)
    disk = 2 * row["row_bytes"] / (chosen.disk[case] * 1e9)
    return float(moved * (row["take_us"] / 1e6 + disk))


def break_even(
    setting: Setting, inputs: Inputs, chosen: Assumptions, gpus: int, case: int
) -> float:
    """Epochs after which a cache of one variant has saved what it cost; infinite: never."""
    own, kept = (
        hours(setting, step_of(setting, inputs, chosen, gpus, case, cached=cached), 1)
        for cached in (False, True)
    )
    cost = fill_hours(setting, inputs, chosen, gpus, case)
    cost += move_seconds(setting, inputs, chosen, gpus, None, case) / 3600
    return cost / (own - kept) if own - kept > 1e-3 * own else math.inf


def checkpoint_seconds(work: dict[str, Any], chosen: Assumptions, case: int) -> float:
    """One process writes weights and AdamW's two states in fp32, all others wait."""
    return float(12 * work["trained_params"] / (chosen.disk[case] * 1e9))
