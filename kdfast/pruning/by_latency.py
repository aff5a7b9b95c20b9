# SPDX-License-Identifier: Apache-2.0
"""Which heads and hidden units to keep so that a model is fast enough. See docs/use/pruning.md."""

import importlib.util
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.block_times import LatencyTable, latency_table, unit_step
from kdfast.pruning.calibration import Calibration
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.reconstruction import Curve, site_curves

# Of the smallest loss: the solver proves no less than this.
GAP = 1e-6


class Choice(NamedTuple):
    """What one block may become.

    Attributes:
        heads: Heads that stay.
        units: Hidden units that stay.
        ms: Time of the block.
        loss: Error that remains, as a share of the variance of the block's stream.
    """

    heads: int
    units: int
    ms: float
    loss: float

    @property
    def empty(self) -> bool:
        return not self.heads and not self.units


@dataclass(frozen=True)
class LatencySelection:
    """The heads and hidden units that ``kdfast.select`` keeps.

    Attributes:
        heads: ``selection`` of ``prune_heads``.
        mlp: ``mlp`` of ``prune_heads``; None where the MLPs cannot be pruned.
        predicted_ms: Time that the pruned model should take.
        dense_ms: Time of the whole model.
        loss: Sum of the errors that remain, each as a share of the variance of its block's stream.
        empty: Indices of blocks without heads and hidden units, which ``drop_blocks`` removes.
        table: The times that the choice was made by.
    """

    heads: list[list[int]]
    mlp: list[list[int]] | None
    predicted_ms: float
    dense_ms: float
    loss: float
    empty: list[int]
    table: LatencyTable

    @property
    def speedup(self) -> float:
        """How many times faster than the whole model, as predicted."""
        return self.dense_ms / self.predicted_ms


class Losses(NamedTuple):
    """What the sites of a model lose by how much of them is removed.

    Attributes:
        heads: Of every attention.
        units: Of every MLP; empty where they cannot be pruned.
    """

    heads: list[Curve]
    units: list[Curve]


def select(
    model: nn.Module,
    calibration: Calibration,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    image_size: tuple[int, int] | None = None,
    table: LatencyTable | None = None,
    cache: str | os.PathLike[str] | bool = True,
    progress: bool = True,
) -> LatencySelection:
    """The heads and hidden units to keep so that the pruned model meets a latency on this machine.

    Every block has a time for each of its numbers of heads and hidden units, which is measured, and
    an error that remains after compensation, from the calibration. Of all combinations whose times
    meet the goal the one with the smallest sum of errors is found exactly, as an integer program
    with one choice per block. A block may lose everything; ``drop_blocks`` then removes it.

    Hidden units stay in multiples of 32, fewer where there are few: kernels are made for them.

    Args:
        model: A model of a family in docs/use/pruning.md. It is not changed.
        calibration: Result of ``calibrate`` on this model.
        speedup: The pruned model is to be that many times faster than the whole model, both
            accelerated; above 1.
        latency_ms: It is to take at most so many milliseconds. One of the two must be given.
        batch: As in ``latency_table``.
        dtype: As in ``latency_table``.
        image_size: As in ``latency_table``.
        table: Result of ``latency_table`` on this model, in place of ``batch``, ``dtype``,
            ``image_size`` and ``cache``.
        cache: As in ``latency_table``.
        progress: Show progress bars on a terminal.

    Raises:
        ImportError: scipy is not installed.
        TypeError: The model's family is not known, or an argument is of another kind.
        ValueError: Not one goal, one that no choice meets (the message names the best), options
            beside a table, or a calibration or a table of another model.

    Warns:
        UserWarning: A table on disk was damaged or of other versions, and was measured again.
    """
    check_goal(speedup, latency_ms)
    anatomy = anatomy_of("select", model)
    if not isinstance(calibration, Calibration):
        raise TypeError(
            "select: calibration must be a result of kdfast.calibrate, got "
            f"{type(calibration).__name__}"
        )
    calibration.check("select", anatomy)
    if table is None:
        table = latency_table(
            model, batch=batch, dtype=dtype, image_size=image_size, cache=cache, progress=progress
        )
        if table.origin.again:
            warnings.warn(f"select: latencies {table.origin.text}", UserWarning, stacklevel=2)
    elif (batch, dtype, image_size, cache) != (1, None, None, True):
        raise ValueError("select: batch, dtype, image_size and cache belong to the table, got both")
    losses = losses_of(anatomy, calibration, progress)
    goal = table.dense_ms / speedup if speedup is not None else latency_ms
    return selected(anatomy, losses, table, goal or 0.0)


def check_goal(speedup: float | None, latency_ms: float | None) -> None:
    """Raises ImportError without scipy, ValueError unless one of two goals is given and is one."""
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("select: needs scipy; pip install 'kdfast[train]'")
    if (speedup is None) == (latency_ms is None):
        given = "neither" if speedup is None else "both"
        raise ValueError(f"select: one of speedup and latency_ms must be given, got {given}")
    if speedup is not None and not 1 < speedup < math.inf:
        raise ValueError(f"select: speedup must be above 1, got {speedup}")
    if latency_ms is not None and not 0 < latency_ms < math.inf:
        raise ValueError(f"select: latency_ms must be above 0, got {latency_ms}")


def losses_of(anatomy: Anatomy, calibration: Calibration, progress: bool) -> Losses:
    """The curves of all sites."""
    return Losses(
        site_curves(anatomy.attentions, calibration.attentions, progress),
        site_curves(anatomy.mlps, calibration.mlps, progress),
    )


def selected(
    anatomy: Anatomy, losses: Losses, table: LatencyTable, goal_ms: float
) -> LatencySelection:
    """The best selection whose time by the table is at most ``goal_ms``.

    Raises:
        ValueError: The table is of another model, or no selection meets the goal.
    """
    depth = len(anatomy.attentions)
    _check_table(anatomy, table)
    rows = [_choices(anatomy, losses, table, block) for block in range(depth)]
    chosen = solved(rows, table, goal_ms)
    empty = [block for block, choice in enumerate(chosen) if choice.empty and anatomy.mlps]
    units = [losses.units[b].best(c.units) for b, c in enumerate(chosen)] if anatomy.mlps else None
    return LatencySelection(
        [losses.heads[block].best(choice.heads) for block, choice in enumerate(chosen)],
        units,
        table.fixed_ms + sum(choice.ms for choice in chosen),
        table.dense_ms,
        sum(choice.loss for choice in chosen),
        empty,
        table,
    )


def _check_table(anatomy: Anatomy, table: LatencyTable) -> None:
    known = {block: kind for kind in table.kinds for block in kind.blocks}
    widths = [len(site.held) for site in anatomy.mlps] or [0] * len(anatomy.attentions)
    wanted = [(len(s.held), u) for s, u in zip(anatomy.attentions, widths, strict=True)]
    got = [(known[b].heads[-1], known[b].units[-1]) for b in sorted(known)]
    if got != wanted:
        raise ValueError(
            f"select: the table must be of a model with {wanted} heads and hidden units, got {got}"
        )


def _choices(anatomy: Anatomy, losses: Losses, table: LatencyTable, block: int) -> list[Choice]:
    """What a block may become: every choice than which none is both faster and better."""
    site, kind, curve = anatomy.attentions[block], table.kind(block), losses.heads[block]
    widths, unit_error = [0], [0.0]
    if anatomy.mlps:
        count = len(anatomy.mlps[block].held)
        widths = sorted({*range(0, count, unit_step(count)), count})
        unit_error = [losses.units[block].error(width) for width in widths]
    every = [
        Choice(heads, width, kind.at(heads, width), curve.error(heads) + error)
        for heads in range(0, len(site.held) + 1, site.group)
        for width, error in zip(widths, unit_error, strict=True)
    ]
    return undominated(every)


def undominated(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that lose less than every faster one, of the empty one and of the others."""
    kept: list[Choice] = [choice for choice in choices if choice.empty]
    best = math.inf
    for choice in sorted(choices, key=lambda c: (c.ms, c.loss, -c.heads, -c.units)):
        if not choice.empty and choice.loss < best:
            best = choice.loss
            kept.append(choice)
    return kept


def solved(rows: Sequence[Sequence[Choice]], table: LatencyTable, goal_ms: float) -> list[Choice]:
    """One choice per block with the smallest sum of losses, and times that meet the goal.

    At least one block keeps something.

    Raises:
        ValueError: No choices meet the goal; the message names what can be reached.
    """
    least = _fastest(rows, table)
    if goal_ms < least:
        raise ValueError(
            f"select: the goal must be at least {least:.2f} ms, a speedup of "
            f"{table.dense_ms / least:.2f}: {table.fixed_ms:.2f} ms lie outside of the blocks, "
            f"the whole model takes {table.dense_ms:.2f} ms; got {goal_ms:.2f} ms"
        )
    whole = [min(row, key=lambda choice: (choice.loss, choice.ms)) for row in rows]
    if table.fixed_ms + sum(choice.ms for choice in whole) <= goal_ms:
        return whole
    return _program(rows, goal_ms - table.fixed_ms)


def _fastest(rows: Sequence[Sequence[Choice]], table: LatencyTable) -> float:
    """The least time with something left in one block."""
    cheapest = [min(choice.ms for choice in row) for row in rows]
    full = [min((c.ms for c in row if not c.empty), default=math.inf) for row in rows]
    more = min(a - b for a, b in zip(full, cheapest, strict=True))
    return table.fixed_ms + sum(cheapest) + more


def _program(rows: Sequence[Sequence[Choice]], budget_ms: float) -> list[Choice]:
    """The integer program: a variable for each choice, one of each block is 1."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    flat = [(block, choice) for block, row in enumerate(rows) for choice in row]
    count, depth = len(flat), len(rows)
    loss = np.array([choice.loss for _, choice in flat])
    ms = np.array([choice.ms for _, choice in flat])
    empty = np.array([float(choice.empty) for _, choice in flat])
    blocks = np.array([block for block, _ in flat])
    pick = csr_matrix((np.ones(count), (blocks, np.arange(count))), shape=(depth, count))
    # The solver's tolerances are absolute: times in shares of the budget's size, losses so large
    # that the smallest still count.
    size = max(float(np.abs(ms).max()), abs(budget_ms))
    result: Any = milp(
        loss * (1e4 / max(float(loss.max()), 1e-300)),
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(pick, 1, 1),
            LinearConstraint(ms[None] / size, -np.inf, budget_ms / size),
            LinearConstraint(empty[None], -np.inf, depth - 1),
        ],
        options={"mip_rel_gap": GAP},
    )
    if result.x is None:
        raise ValueError(f"select: the solver must find a selection, got: {result.message}")
    return [flat[index][1] for index in np.flatnonzero(result.x > 0.5)]
