# SPDX-License-Identifier: Apache-2.0
"""Chooses which heads, or hidden units, to keep. See docs/use/pruning.md."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.pruning.scores import HeadScores

SCOPES = ("block", "global")
ONE_UNIT = ("leave_one_out", "reconstruction")


def select_heads(
    scores: HeadScores | Sequence[Sequence[float] | Tensor],
    keep: int | float | Sequence[int],
    scope: str = "block",
    min_heads: int = 1,
    *,
    relative: bool | None = None,
) -> list[list[int]]:
    """Positions of the heads with the highest scores.

    Scores of ``mlp_scores`` are treated the same, with hidden units for heads. Heads that share a
    key/value head stay or go together, by the sum of their scores.

    Args:
        scores: Importance per block and head; higher is more important.
        keep: int: heads per block. float: the fraction that stays, in (0, 1], rounded to the
            nearest number of heads, halves up. A list: heads of each block.
        scope: "block": the best heads of every block. "global": as many heads in all, but the
            best of the whole model by score / mean score of the block; an int is then the average
            per block.
        min_heads: No block keeps fewer; a fraction that gives fewer is raised to it. 0 lets a block
            lose its whole attention.
        relative: In global scope, divide by the mean score of the block. False compares the scores
            as they are, which makes sense where they are in one unit. None: False for scores of
            "leave_one_out" and "reconstruction", which are.

    Returns:
        For every block the positions of the kept heads in the scored model, ascending. Of equal
        scores the lower head wins, in global scope the lower head of any block, then the lower
        block.

    Raises:
        TypeError: ``keep`` or ``min_heads`` is of another kind.
        ValueError: The request cannot be met, or scores are not finite, or are negative in global
            scope where they are divided.
    """
    rows = scores.scores if isinstance(scores, HeadScores) else _rows(scores)
    metadata = scores.metadata if isinstance(scores, HeadScores) else {}
    if relative is None:
        relative = not (isinstance(scores, HeadScores) and scores.method in ONE_UNIT)
    groups = metadata.get("groups", [])
    if groups and max(groups) > 1:
        chosen = _select_groups(rows, groups, keep, scope, min_heads, relative)
    else:
        chosen = _select(rows, keep, scope, min_heads, relative)
    # Where all sets were tried, the best of that size is known; the highest scores need not be it.
    better = metadata.get("choices") or [None] * len(chosen)
    return [
        row if sets is None else list(sets[len(row)])
        for row, sets in zip(chosen, better, strict=True)
    ]


def _select(
    rows: Sequence[Tensor],
    keep: int | float | Sequence[int],
    scope: str,
    min_heads: int,
    relative: bool,
) -> list[list[int]]:
    """Positions of the highest scores, without groups."""
    sizes = [len(row) for row in rows]
    if scope not in SCOPES:
        raise ValueError(f"select_heads: scope must be one of {SCOPES}, got {scope!r}")
    _check_min_heads(min_heads, sizes)
    if scope == "block":
        counts = kept_counts("select_heads", keep, sizes, min_heads)
        return [_best(row, count) for row, count in zip(rows, counts, strict=True)]
    return _best_of_all(rows, _budget(keep, sizes, min_heads), min_heads, relative)


def kept_counts(
    function: str, keep: int | float | Sequence[int], sizes: Sequence[int], min_heads: int = 1
) -> list[int]:
    """Number of kept heads of every block.

    Args:
        function: Name of the caller, for messages.
        keep: As in ``select_heads``.
        sizes: Heads that every block has.
        min_heads: As in ``select_heads``.

    Raises:
        TypeError: ``keep`` is of another kind.
        ValueError: Out of range for a block.
    """
    if isinstance(keep, float):
        _check_fraction(function, keep)
        counts = [min(size, max(min_heads, _share(keep, size))) for size in sizes]
    elif _is_int(keep):
        counts = [keep] * len(sizes)  # type: ignore[list-item]
    elif isinstance(keep, Sequence) and not isinstance(keep, str):
        counts = list(keep)
        if not all(_is_int(count) for count in counts):
            raise TypeError(f"{function}: keep must hold one int per block, got {counts}")
        if len(counts) != len(sizes):
            raise ValueError(
                f"{function}: keep must have one entry per block ({len(sizes)}), got {len(counts)}"
            )
    else:
        raise TypeError(f"{function}: keep must be an int, a float or a list, got {keep!r}")
    for block, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if not min(min_heads, size) <= count <= size:
            raise ValueError(
                f"{function}: keep must be in [{min(min_heads, size)}, {size}] for block {block}, "
                f"got {count}"
            )
    return counts


def _rows(scores: Sequence[Sequence[float] | Tensor]) -> list[Tensor]:
    return HeadScores([torch.as_tensor(row, dtype=torch.float64) for row in scores], "given").scores


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _share(fraction: float, size: int) -> int:
    return int(fraction * size + 0.5)


def _check_fraction(function: str, keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"{function}: keep as a fraction must be in (0, 1], got {keep}")


def _check_min_heads(min_heads: int, sizes: Sequence[int]) -> None:
    if not _is_int(min_heads):
        raise TypeError(f"select_heads: min_heads must be an int, got {min_heads!r}")
    smallest = min((size for size in sizes if size), default=0)
    if not 0 <= min_heads <= smallest:
        raise ValueError(
            f"select_heads: min_heads must be in [0, {smallest}], the heads of the smallest "
            f"block, got {min_heads}"
        )


def _budget(keep: int | float | Sequence[int], sizes: Sequence[int], min_heads: int) -> int:
    """Heads to keep in the whole model."""
    if isinstance(keep, float):
        _check_fraction("select_heads", keep)
        return max(min_heads * len(sizes), _share(keep, sum(sizes)))
    if not _is_int(keep):
        raise TypeError(
            f"select_heads: keep must be an int or a float in global scope, got {keep!r}"
        )
    budget: int = keep * len(sizes)  # type: ignore[operator]
    if not min_heads * len(sizes) <= budget <= sum(sizes):
        raise ValueError(
            f"select_heads: keep must give {min_heads * len(sizes)} to {sum(sizes)} heads in all, "
            f"got {keep} x {len(sizes)} blocks"
        )
    return budget


def _ranked(row: Tensor) -> list[int]:
    values = row.tolist()
    return sorted(range(len(values)), key=lambda head: (-values[head], head))


def _best(row: Tensor, count: int) -> list[int]:
    return sorted(_ranked(row)[:count])


def _best_of_all(
    rows: Sequence[Tensor], budget: int, min_heads: int, relative: bool
) -> list[list[int]]:
    kept = [_ranked(row)[:min_heads] for row in rows]
    rest = []
    for block, row in enumerate(rows):
        values = row
        if relative and len(row):
            if row.min() < 0:
                raise ValueError(
                    f"select_heads: scores must not be negative in global scope, got "
                    f"{row.min().item()} in block {block}; relative=False compares them as they are"
                )
            # A block whose scores are all zero has nothing worth keeping: it stays at zero.
            values = row / row.mean().clamp_min(torch.finfo(row.dtype).tiny)
        rest += [(-values[head].item(), head, block) for head in _ranked(row)[min_heads:]]
    for _, head, block in sorted(rest)[: budget - sum(map(len, kept))]:
        kept[block].append(head)
    return [sorted(heads) for heads in kept]


def _select_groups(
    rows: Sequence[Tensor],
    groups: Sequence[int],
    keep: int | float | Sequence[int],
    scope: str,
    min_heads: int,
    relative: bool,
) -> list[list[int]]:
    """The same for groups of heads, each scored by the sum of its heads."""
    size = groups[0]
    counts = keep if isinstance(keep, Sequence) else [] if isinstance(keep, float) else [keep]
    if len(set(groups)) > 1 or any(count % size for count in counts):
        raise ValueError(
            f"select_heads: keep must be a multiple of {size}, the heads that share a key/value "
            f"head, got {keep}"
        )
    fewer: Any = keep
    if not isinstance(keep, float):
        fewer = [c // size for c in counts] if isinstance(keep, Sequence) else keep // size
    sums = [row.unflatten(0, (-1, size)).sum(1) for row in rows]
    chosen = _select(sums, fewer, scope, -(-min_heads // size), relative)
    return [[g * size + i for g in row for i in range(size)] for row in chosen]
