# SPDX-License-Identifier: Apache-2.0
"""The picture of a training: every logged value over the steps, and the held-out metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast.machine.files import replacing
from kdfast.trainer.job import Job
from kdfast.trainer.logs import STEPS, read_rows

COLUMNS = 3
# Inches of a panel, with what stands around it.
PANEL = (4.2, 2.4)
DPI = 110
# More epochs than that would be a grey surface instead of lines.
MARKED_EPOCHS = 60
# Weight of distillation in the loss: where it changes, so does the loss.
ALPHA = "alpha"

# What names of columns leave open.
SAID = {
    "total": "total (the loss)",
    "images_per_s": "images per second",
    "time": "seconds per step",
    "data_time": "seconds of a step that wait for data",
    "memory_mib": "memory, MiB",
}

Rows = Sequence[Mapping[str, str]]


def draw_curves(job: Job) -> Path | None:
    """Plot ``steps.csv`` and the headline of the epochs' CSV over the step as ``curves.png``.

    Grey lines are the ends of epochs, red ones changes of ``alpha``.

    Returns:
        The picture; None without rows.
    """
    steps = _rows(job.logs / STEPS)
    if not steps:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {name: _series(steps, name) for name in steps[0] if name not in ("step", "epoch")}
    epochs = _rows(job.logs / job.epochs_file)
    metric = job.watch.headline_of(epochs[0]) if epochs else None
    if metric is not None:
        curves = {f"held-out {metric}": _series(epochs, metric)} | curves
    lines = -(-len(curves) // COLUMNS)
    width, height = PANEL[0] * COLUMNS, PANEL[1] * lines + 0.4
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # Fixed margins, in inches: a layout engine takes longer than the drawing.
    figure.subplots_adjust(
        0.7 / width, 0.45 / height, 1 - 0.2 / width, 1 - 0.75 / height, wspace=0.26, hspace=0.5
    )
    ends, changes = _ends(steps), _changes(steps)
    for position, (name, (x, y)) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(lines, COLUMNS, position)
        held = position == 1 and metric is not None
        _draw(axes, x, y, "tab:green" if held else "tab:blue", marked=held or len(x) < 10)
        axes.set_title(SAID.get(name, name), fontsize=9)
        _mark(axes, ends, changes)
        axes.set_xlim(0, int(steps[-1]["step"]) * 1.02)
        if position > len(curves) - COLUMNS:
            axes.set_xlabel("step", fontsize=8)
    figure.suptitle(_title(job, ends, changes), fontsize=10, y=1 - 0.12 / height, va="top")
    target = job.logs / "curves.png"
    with replacing(target) as partial:
        figure.savefig(partial, dpi=DPI)
    return target


def _rows(path: Path) -> list[dict[str, str]]:
    return read_rows(path) if path.is_file() else []


def _series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


def _ends(steps: Rows) -> list[int]:
    """Last logged steps of the epochs that another one follows."""
    pairs = zip(steps, steps[1:], strict=False)
    ends = [int(a["step"]) for a, b in pairs if a.get("epoch") != b.get("epoch")]
    return ends if len(ends) <= MARKED_EPOCHS else []


def _changes(steps: Rows) -> list[tuple[int, float]]:
    """Steps after which ``alpha`` has another value, and that value."""
    pairs = zip(steps, steps[1:], strict=False)
    found = [(int(a["step"]), float(b[ALPHA])) for a, b in pairs if a.get(ALPHA) != b.get(ALPHA)]
    # A value that changes all the time is a curve.
    return found if len(found) <= len(steps) // 2 else []


def _draw(axes: Any, x: Sequence[int], y: Sequence[float], colour: str, *, marked: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.plot(x, y, linewidth=1.2, color=colour, marker="." if marked else None, markersize=5)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Numbers as they are: "1e-5 + 8.27e2" above an axis is overlooked.
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)


def _mark(axes: Any, ends: Sequence[int], changes: Sequence[tuple[int, float]]) -> None:
    for step in ends:
        axes.axvline(step, color="0.75", linewidth=0.8, zorder=0)
    for step, _ in changes:
        axes.axvline(step, color="tab:red", linewidth=0.9, linestyle=":", zorder=0)


def _title(job: Job, ends: Sequence[int], changes: Sequence[tuple[int, float]]) -> str:
    words = [f"{job.title} in {job.logs.name}" if job.title != job.logs.name else job.title]
    if ends:
        words.append("grey: end of an epoch")
    if changes:
        to = ", ".join(f"{value:g}" for _, value in changes[:3])
        more = ", ..." if len(changes) > 3 else ""
        words.append(f"dotted red: {ALPHA} becomes {to}{more}")
    return "    ".join(words)
