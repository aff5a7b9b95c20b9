# SPDX-License-Identifier: Apache-2.0
"""A picture of head scores, blocks by heads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy
from torch import Tensor

from kdfast.machine.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More columns than this are drawn without a tick for each, in a picture of one size.
TICKS = 32


class Scored(Protocol):
    """What is drawn of ``HeadScores``."""

    @property
    def scores(self) -> list[Tensor]:
        """A row per block."""

    @property
    def method(self) -> str:
        """How they were made."""

    @property
    def part(self) -> str:
        """What has the scores: "head" or "unit"."""


def draw_head_scores(scores: Scored, kept: Sequence[Sequence[int]] | None, path: Path) -> None:
    """Writes a heat map; heads that are removed are crossed out.

    Args:
        scores: Scores of the unpruned model.
        kept: Positions per block, as from ``select_heads``; None crosses nothing out.
        path: File to write; its ending says the format, PNG without one.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = head_score_figure(scores, kept)
    path = Path(path)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:] or "png")


def head_score_figure(scores: Scored, kept: Sequence[Sequence[int]] | None) -> "Figure":
    """The picture of ``draw_head_scores``, for a notebook or a page with others.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: ``kept`` has another number of blocks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row.numpy() for row in scores.scores]
    if kept is not None and len(kept) != len(rows):
        raise ValueError(f"HeadScores: kept must have {len(rows)} blocks, got {len(kept)}")
    widest = max(1, *(len(row) for row in rows))
    table = numpy.full((len(rows), widest), numpy.nan)
    for block, row in enumerate(rows):
        table[block, : len(row)] = row
    width = 2.2 + 0.42 * min(widest, TICKS)
    figure = Figure(figsize=(width, 1.6 + 0.36 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(table, cmap="viridis", aspect="auto", interpolation="nearest")
    title = f"{scores.part} scores: {scores.method}"
    if kept is not None:
        gone = _cross_out(axes, rows, kept)
        total = sum(map(len, rows))
        title += f"\n{gone} of {total} {scores.part}s removed (crossed out)"
    if widest <= TICKS:
        axes.set_xticks(range(widest))
    axes.set_yticks(range(len(rows)))
    axes.set_xlabel(scores.part)
    axes.set_ylabel("block")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="score, higher is more important")
    return figure


def _cross_out(axes: Any, rows: Sequence[Any], kept: Sequence[Sequence[int]]) -> int:
    """Marks what is not kept; how many that are."""
    sets = [set(block) for block in kept]
    gone = [
        (head, block)
        for block, row in enumerate(rows)
        for head in range(len(row))
        if head not in sets[block]
    ]
    if gone:
        # White under black, to be seen on every colour.
        x, y = zip(*gone, strict=True)
        axes.scatter(x, y, marker="x", s=60, c="white", linewidths=3)
        axes.scatter(x, y, marker="x", s=50, c="black", linewidths=1.2)
    return len(gone)
