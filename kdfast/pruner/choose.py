# SPDX-License-Identifier: Apache-2.0
"""What stays of a model: by scores, by a file, or by a latency; and the cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.pruner.checks import UsageError, asked, compensates
from kdfast.pruner.work import Work
from kdfast.pruning import HeadScores, head_scores, mlp_scores, select_heads
from kdfast.pruning.block_times import latency_table
from kdfast.pruning.by_latency import Losses, losses_of, selected
from kdfast.pruning.compensate import SiteError
from kdfast.pruning.keep import Keep, counted, read_heads
from kdfast.pruning.latency import leave_one_out_seconds
from kdfast.pruning.latency_goal import Goal, Outcome, corrected, tried
from kdfast.pruning.scores import MLP_METHODS
from kdfast.pruning.surgery import prune_heads

Selection = list[list[int]]  # positions that are kept, per block


class Chosen(NamedTuple):
    """What stays of a model.

    Attributes:
        scores: Of its heads, for the files.
        heads: Positions that are kept.
        units: The same of hidden units, where MLPs are pruned.
        outcome: Predicted and measured time, where a latency was asked for.
    """

    scores: HeadScores
    heads: Selection
    units: Selection | None
    outcome: Outcome | None = None


class Scored(NamedTuple):
    """Scores of a model's heads, and of its hidden units where they are to be pruned."""

    heads: HeadScores
    units: HeadScores | None


def scored(work: Work) -> Scored:
    """The scores that --method names."""
    options, model = work.options, work.model
    print(f"scoring heads by {options.method}, on {_source(work)}")
    if options.method == "leave_one_out":
        print(_effort(model, sum(work.heads), work.batches))
    heads = head_scores(model, options.method, _data(work, options.method), seed=options.seed)
    if options.mlp_keep is None:
        return Scored(heads, None)
    method = options.method if options.method in MLP_METHODS else "taylor"
    return Scored(heads, mlp_scores(model, method, _data(work, method)))


def by_scores(work: Work, scores: Scored, keep: Keep | Path) -> Chosen:
    """What --keep and --mlp-keep leave, by the scores; a file says it without them."""
    options, units = work.options, None
    with asked(ValueError, TypeError):
        if isinstance(keep, Path):
            heads = read_heads(keep, work.heads, "--keep")
        else:
            heads = select_heads(scores.heads, keep, options.scope)
        if scores.units is not None:
            units = select_heads(scores.units, options.mlp_keep, options.scope)
    print(f"keep {_shown(keep)}: {counted(heads, work.heads)}")
    if units is not None and (options.sweep is None or keep == options.sweep[-1]):
        words = counted(units, work.units, "hidden units")
        print(f"mlp-keep {_shown(options.mlp_keep)}: {words}")
    return Chosen(scores.heads, heads, units)


def for_latency(work: Work) -> tuple[Chosen, Tensor]:
    """What --speedup or --latency-ms leave, and the images that the times are of."""
    model, options, images = work.model, work.options, work.images
    batch, calibration = options.latency_batch, work.calibration
    if calibration is None:
        raise UsageError("--speedup and --latency-ms need pictures")
    dtype = getattr(torch, options.latency_dtype) if options.latency_dtype else images.dtype
    images = images.expand(batch, *images.shape[1:]).contiguous().to(dtype)
    place: Path | bool = options.cache or not options.no_cache
    goal = Goal(options.speedup, options.latency_ms)
    size = (images.shape[2], images.shape[3])
    table = latency_table(model, batch=batch, dtype=dtype, image_size=size, cache=place)
    print(f"latencies of blocks: {table.origin.text}")
    losses = losses_of(work.anatomy, calibration, progress=True)
    with asked(ValueError):
        selection = selected(work.anatomy, losses, table, goal.ms(table.dense_ms))
    result = tried(model, selection, images, options.rounds)
    print(f"first try: {result.pruned.ms:.2f} ms, predicted {result.predicted_ms:.2f} ms")
    if result.misses(goal):
        result = _again(work, losses, result, goal)
    scores = head_scores(model, "reconstruction", calibration)
    return Chosen(scores, result.selection.heads, result.selection.mlp, result), images


def _again(work: Work, losses: Losses, first: Outcome, goal: Goal) -> Outcome:
    """The selection for predictions as far off as the first was, or the first if there is none."""
    missed = f"it misses {goal}, by more than times may be off ({first.spread:.1%})"
    try:
        result = corrected(work.anatomy, losses, first, goal)
    except ValueError as error:
        print(f"{missed}, and nothing can be done about it: {error}")
        return first
    print(f"{missed}: chosen again, with predictions times {result.factor:.3f}")
    return result


def cut(work: Work, chosen: Chosen) -> tuple[nn.Module, list[SiteError]]:
    """The pruned model, and the errors of its sites where it was compensated."""
    options, more = work.options, dict[str, Any]()
    if work.calibration is not None:
        more = {"compensate": work.calibration, "sequential": options.sequential}
        more["data"] = work.pictures
    elif options.mean_context:
        more = {"mean_context": True, "data": work.batches}
    errors: list[SiteError] = []
    pruned = prune_heads(work.model, chosen.heads, mlp=chosen.units, errors=errors, **more)
    return pruned.eval(), errors


def _shown(keep: Keep | Path) -> str:
    if isinstance(keep, float):
        return f"{100 * keep:g} %"
    return "as in the list" if isinstance(keep, list) else str(keep)


def _data(work: Work, method: str) -> Any:
    """What a score of this method reads."""
    if method == "magnitude":
        return None
    fitted = method == "reconstruction" and work.calibration is not None
    return work.calibration if fitted else work.batches


def _source(work: Work) -> str:
    """What the scores are measured on, in words."""
    options = work.options
    if options.method == "magnitude":
        return "the weights alone"
    if options.method == "reconstruction" and compensates(options):
        return "the same pictures"
    count = f"up to {options.batches * options.batch_size}"
    if options.data:
        return f"{count} pictures of {options.data}"
    return f"{count} rendered driving scenes; --data takes pictures of your own"


def _effort(model: nn.Module, heads: int, batches: Sequence[Tensor]) -> str:
    """How long leave-one-out will take, and what takes less, in words."""
    seconds = leave_one_out_seconds(model, heads, batches)
    span = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    images = sum(map(len, batches))
    return (
        f"{heads} heads, each left out in half a pass over {images} "
        f"picture{'s' * (images > 1)}: about {span}; "
        "fewer --batches take less; --method taylor takes one pass forth and back in all"
    )
