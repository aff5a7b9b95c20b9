# SPDX-License-Identifier: Apache-2.0
"""Whether a selection is as fast as asked, and what to do if not. See docs/use/pruning.md."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.machine.timing import interleave, summarize
from kdfast.nn import accelerate
from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.block_times import LatencyTable, fastest
from kdfast.pruning.by_latency import LatencySelection, Losses, selected
from kdfast.pruning.constant import DropReport, drop_blocks
from kdfast.pruning.latency import Latency
from kdfast.pruning.surgery import prune_heads

# Predictions that are off by more get an explanation.
CLOSE = 0.1


@dataclass(frozen=True)
class Goal:
    """What was asked for; one of the two is None."""

    speedup: float | None
    latency_ms: float | None

    def ms(self, dense_ms: float) -> float:
        """The time that meets it, where the whole model takes ``dense_ms``."""
        if self.speedup is not None:
            return dense_ms / self.speedup
        return self.latency_ms or 0.0

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"a speedup of {self.speedup:g}"
        return f"{self.latency_ms:g} ms"


@dataclass(frozen=True)
class Outcome:
    """Predicted and measured time of a selection.

    Attributes:
        selection: The heads and hidden units.
        factor: What the table's prediction was multiplied by, after a first measurement.
        dense: Measured time of the whole model.
        pruned: Measured time of the pruned model.
        rounds: Samples of each.
    """

    selection: LatencySelection
    factor: float
    dense: Latency
    pruned: Latency
    rounds: int

    @property
    def table(self) -> LatencyTable:
        """The times that the selection was made by."""
        return self.selection.table

    @property
    def predicted_ms(self) -> float:
        """Of the pruned model."""
        return self.factor * self.selection.predicted_ms

    @property
    def predicted_speedup(self) -> float:
        """Over the whole model."""
        return self.table.dense_ms / self.predicted_ms

    @property
    def speedup(self) -> float:
        """As measured."""
        return self.dense.ms / self.pruned.ms

    @property
    def spread(self) -> float:
        """What the times may be off by, as a share of them: the larger distance of quartiles of
        the two samples, over the root of their number."""
        return max(x.iqr / x.ms for x in (self.dense, self.pruned)) / math.sqrt(self.rounds)

    def misses(self, goal: Goal) -> bool:
        """Whether the goal is missed by more than the times may be off."""
        return self.pruned.ms > goal.ms(self.dense.ms) * (1 + self.spread)

    def facts(self) -> dict[str, Any]:
        """JSON values for a report."""
        return {
            "predicted_ms": self.predicted_ms,
            "measured_ms": self.pruned.ms,
            "deviation": self.pruned.ms / self.predicted_ms - 1,
            "dense_ms": {"table": self.table.dense_ms, "measured": self.dense.ms},
            "fixed_ms": self.table.fixed_ms,
            "speedup": {"predicted": self.predicted_speedup, "measured": self.speedup},
            "factor": self.factor,
            "spread": self.spread,
            "loss": self.selection.loss,
            "empty": self.selection.empty,
            "table": self.table.origin.text,
        }

    def reasons(self) -> list[str]:
        """Why the prediction is off, if it is by more than 10 %: one line each."""
        table, drift = self.table, self.dense.ms / self.table.dense_ms - 1
        if abs(self.pruned.ms / self.predicted_ms - 1) <= CLOSE:
            return []
        lines = []
        if abs(drift) > CLOSE / 2:
            lines.append(
                f"the whole model takes {1 + drift:.2f} times as long as when the table was "
                "measured: the machine's speed or load changed; --no-cache measures again"
            )
        lines.append(
            f"quartiles of the samples lie {table.spread:.0%} apart in the table, and times of now "
            f"may be off by {self.spread:.0%}"
        )
        fixed = table.fixed_ms / table.dense_ms
        lines.append(f"{fixed:.0%} of the whole model's time lies outside of its blocks")
        return lines


def remarks(result: Outcome, goal: Goal, dropped: DropReport) -> Iterator[str]:
    """What there is to say of a measured selection, in lines."""
    missed = "not " if result.misses(goal) else ""
    yield f"{goal}: {missed}reached, times may be off by {result.spread:.1%}"
    yield from result.reasons()
    if dropped.dropped:
        yield f"removed blocks: {', '.join(dropped.dropped)}"
    for name, reason in dropped.left.items():
        yield f"empty, but not removed: {name}: {reason}"


def tried(
    model: nn.Module, selection: LatencySelection, images: Tensor, rounds: int, factor: float = 1.0
) -> Outcome:
    """Times the whole and the pruned model, which is only cut: weights do not change times.

    Like those of a table, times are the means of the fastest samples.

    Args:
        model: The whole model.
        selection: What to keep.
        images: (B, 3, H, W), in the type in which the models run.
        rounds: Samples of each.
        factor: As in ``Outcome``.
    """
    whole = copy.deepcopy(model).to(images.dtype).eval()
    pruned = prune_heads(whole, selection.heads, mlp=selection.mlp)
    drop_blocks(pruned, images)
    calls = {}
    for name, some in (("dense", whole), ("pruned", pruned)):
        accelerate(some)
        calls[name] = lambda m=some: m(images)
    with torch.inference_mode():
        samples = interleave(calls, rounds=rounds)
    dense, cut = (
        Latency(1e3 * fastest([s for s, _ in row]), summarize(row)["iqr"])
        for row in samples.values()
    )
    return Outcome(selection, factor, dense, cut, rounds)


def corrected(anatomy: Anatomy, losses: Losses, first: Outcome, goal: Goal) -> Outcome:
    """Another selection, for predictions as far off as the first was; not measured yet.

    Args:
        anatomy: Of the whole model.
        losses: Of its sites.
        first: A selection that misses the goal.
        goal: What was asked for.

    Returns:
        The selection with the factor of its prediction, and the times of the first.

    Raises:
        ValueError: No selection would meet the goal.
    """
    table = first.table
    if goal.speedup is not None:
        factor = first.predicted_speedup / first.speedup
    else:
        factor = first.pruned.ms / first.predicted_ms
    # Beyond the goal by what the first measurement may be off, so as not to miss it again.
    aim = goal.ms(table.dense_ms) / factor / (1 + first.spread)
    return replace(first, selection=selected(anatomy, losses, table, aim), factor=factor)
