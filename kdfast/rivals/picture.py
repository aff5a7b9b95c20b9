# SPDX-License-Identifier: Apache-2.0
"""A picture of a comparison: latency against agreement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdfast.machine.files import replacing
from kdfast.rivals.report import models
from kdfast.rivals.results import Row

COLOURS = {"fp32": "tab:blue", "bf16": "tab:green", "int8": "tab:orange"}
MARKERS = ("o", "^", "s")
# Smaller distances are the rounding of fp32, which has no order.
FLOOR = 1e-6
# Places of a label around its point, in points of the page, the nearest first.
STEPS = (9, 20, 31, 42, 53, 64, 75, 86, 97, 108)


def draw(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Writes a PNG of the candidates that were measured.

    Args:
        rows: Of a comparison.
        path: PNG file.
        title: Above the picture.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [row for row in rows if row.ms is not None and row.cosine is not None]
    if not points:
        return False
    figure = Figure(figsize=(10.5, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    known = models(rows)
    for row in points:
        marker = MARKERS[known.index(row.model) % len(MARKERS)]
        place = (_ms(row), _distance(row))
        axes.scatter(*place, s=55, color=COLOURS[row.dtype], marker=marker, zorder=3)
    _frame(axes, points, title)
    _legend(axes, known)
    figure.canvas.draw()
    _label(axes, points)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
    return True


def _ms(row: Row) -> float:
    return row.ms or 0.0


def _distance(row: Row) -> float:
    return max(FLOOR, 1 - (row.cosine or 0.0))


def _frame(axes: Any, points: Sequence[Row], title: str) -> None:
    """Axes, their limits and names."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    times = [_ms(row) for row in points]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(times) / 1.25, max(times) * 1.6)
    axes.set_ylim(FLOOR / 6, max(5.0 * max(map(_distance, points)), 1e-2))
    steps = [s * 10**e for e in range(-3, 6) for s in (1, 1.5, 2, 3, 5, 7)]
    axes.set_xticks([s for s in steps if axes.get_xlim()[0] <= s <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("median latency of a call, ms (left is faster)")
    axes.set_ylabel("1 - cosine with the original's output (lower agrees better)")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.axhspan(FLOOR / 6, 1.5 * FLOOR, color="black", alpha=0.05)
    axes.text(
        *(0.995, 0.012),
        "the same up to the rounding of fp32",
        transform=axes.transAxes,
        ha="right",
        fontsize=8,
        color="dimgray",
    )


def _legend(axes: Any, known: Sequence[str]) -> None:
    """Colours are precisions, shapes are models."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], marker="o", ls="", color=colour, label=dtype)
        for dtype, colour in COLOURS.items()
    ]
    entries += [
        Line2D([], [], marker=marker, ls="", color="gray", label=f"{name} model")
        for name, marker in zip(known, MARKERS, strict=False)
    ]
    axes.figure.legend(handles=entries, fontsize=9, loc="outside lower center", ncols=len(entries))


def _label(axes: Any, points: Sequence[Row]) -> None:
    """Names beside the points, where neither another name nor a point is."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    centres = [axes.transData.transform((_ms(row), _distance(row))) for row in points]
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in centres]
    frame = axes.get_window_extent(renderer)
    order = sorted(range(len(points)), key=lambda i: centres[i][0])
    for index in order:
        row = points[index]
        text = axes.annotate(
            f"{row.name}  {row.ms:.1f}",
            (_ms(row), _distance(row)),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "gray", "shrinkB": 3},
        )
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        x, y = centres[index]
        for dx, dy in _places(width / scale):
            left = x + dx * scale
            spot = (left, y + dy * scale - height / 2, left + width, y + dy * scale + height / 2)
            inside = spot[0] > frame.x0 and spot[2] < frame.x1 and frame.y0 < spot[1]
            if inside and spot[3] < frame.y1 and not any(_overlap(spot, other) for other in taken):
                break
        text.set_position((dx, dy))
        taken.append(spot)


def _places(width: float) -> Iterator[tuple[float, float]]:
    """Offsets of a label's left end from its point, the nearest first."""
    yield 8, 0
    for step in STEPS:
        for dy in (step, -step):
            for dx in (4, -width / 2, -width - 4):
                yield dx, dy


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
