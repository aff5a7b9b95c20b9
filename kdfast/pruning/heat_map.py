# SPDX-License-Identifier: Apache-2.0
"""A picture of head scores, blocks by heads."""

from collections.abc import Sequence
from pathlib import Path

import numpy

from kdfast.machine.files import replacing
from kdfast.pruning.scores import HeadScores


def draw_head_scores(scores: HeadScores, kept: Sequence[Sequence[int]], path: Path) -> None:
    """Writes a heat map; heads that are removed are crossed out.

    Args:
        scores: Scores of the unpruned model.
        kept: Positions per block, as from ``select_heads``.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row.numpy() for row in scores.scores]
    widest = max(1, *(len(row) for row in rows))
    table = numpy.full((len(rows), widest), numpy.nan)
    for block, row in enumerate(rows):
        table[block, : len(row)] = row
    figure = Figure(figsize=(2.2 + 0.42 * widest, 1.6 + 0.36 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(table, cmap="viridis", aspect="auto")
    gone = [
        (head, block)
        for block, row in enumerate(rows)
        for head in range(len(row))
        if head not in set(kept[block])
    ]
    if gone:
        # White under black, to be seen on every colour.
        x, y = zip(*gone, strict=True)
        axes.scatter(x, y, marker="x", s=60, c="white", linewidths=3)
        axes.scatter(x, y, marker="x", s=50, c="black", linewidths=1.2)
    axes.set_xticks(range(widest))
    axes.set_yticks(range(len(rows)))
    axes.set_xlabel("head")
    axes.set_ylabel("block")
    removed = f"{len(gone)} of {sum(map(len, rows))} heads removed (crossed out)"
    axes.set_title(f"head scores: {scores.method}\n{removed}", fontsize=10)
    figure.colorbar(image, ax=axes, label="score, higher is more important")
    path = Path(path)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:] or "png")
