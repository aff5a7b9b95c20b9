# SPDX-License-Identifier: Apache-2.0
"""One budget of FLOPs for heads and hidden units together. See docs/use/compensation.md."""

from collections.abc import Sequence

from torch import nn

from kdfast.pruning.adapter import Site
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.scores import HeadScores

Selection = list[list[int]]


def select_together(
    model: nn.Module,
    heads: HeadScores,
    units: HeadScores,
    keep: float,
    *,
    image_size: tuple[int, int] | None = None,
) -> tuple[Selection, Selection]:
    """The heads and hidden units to keep so that a share of the blocks' FLOPs stays.

    What costs the least error for each FLOP goes first, whether head or unit, in whatever block; a
    block may lose everything. So heads and units need no share of their own.

    Args:
        model: The model that was scored.
        heads: Scores of ``head_scores(model, "reconstruction", ...)``.
        units: Scores of ``mlp_scores(model, "reconstruction", ...)`` from the same calibration.
        keep: Share of the FLOPs of all attentions and MLPs that stays at most, in (0, 1].
        image_size: (height, width) to count FLOPs for; None: the model's own.

    Returns:
        ``selection`` and ``mlp`` of ``prune_heads``.

    Raises:
        TypeError: The model's family is not known.
        ValueError: The scores are of another method or model, or ``keep`` is out of range.
    """
    anatomy = anatomy_of("select_together", model)
    if not 0 < keep <= 1:
        raise ValueError(f"select_together: keep must be in (0, 1], got {keep}")
    pairs = ((heads, anatomy.attentions, "heads"), (units, anatomy.mlps, "units"))
    for scores, sites, name in pairs:
        _check(scores, sites, name)
    size = image_size or anatomy.adapter.image_size(model)
    blocks, _ = anatomy.adapter.flops(model, size)
    costs = [
        [(block.gemm + block.attention) for block in blocks],
        [block.mlp for block in blocks],
    ]
    # (error for each FLOP, kind, block, slices that go together, FLOPs of them)
    steps: list[tuple[float, int, int, int, float]] = []
    for kind, (scores, sites, _) in enumerate(pairs):
        for block, (row, site) in enumerate(zip(scores.scores, sites, strict=True)):
            cost = costs[kind][block] / max(len(site.held), 1) * site.group
            for score in row.unflatten(0, (-1, site.group)).sum(1).tolist():
                steps.append((score / cost, kind, block, site.group, cost))
    counts = [[len(site.held) for site in sites] for _, sites, _ in pairs]
    excess = sum(map(sum, costs)) * (1 - keep)
    for _, kind, block, group, cost in sorted(steps):
        if excess <= 0:
            break
        counts[kind][block] -= group
        excess -= cost
    kept, mlp = (
        [_best(scores, block, count) for block, count in enumerate(row)]
        for (scores, _, _), row in zip(pairs, counts, strict=True)
    )
    return kept, mlp


def _check(scores: HeadScores, sites: Sequence[Site], name: str) -> None:
    if scores.method != "reconstruction":
        raise ValueError(
            f"select_together: {name} must be scored by 'reconstruction', got {scores.method!r}"
        )
    want, got = [len(site.held) for site in sites], [len(row) for row in scores.scores]
    if want != got or not want:
        raise ValueError(f"select_together: {name} must have {want} scores per block, got {got}")


def _best(scores: HeadScores, block: int, count: int) -> list[int]:
    """The ``count`` positions of a block to keep."""
    choices = (scores.metadata.get("choices") or {block: None})[block]
    if choices is not None:
        return list(choices[count])
    values = scores.scores[block].tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
