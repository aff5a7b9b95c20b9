# SPDX-License-Identifier: Apache-2.0
"""Several shares of one model: one table, one picture, and a folder for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdfast.machine.files import replacing, write_text
from kdfast.pruner.checks import asked, sweep_folders
from kdfast.pruner.choose import Chosen, by_scores, cut, scored
from kdfast.pruner.measure import Measured, file_bytes, measured
from kdfast.pruner.output import (
    facts,
    judged,
    next_command,
    numbers,
    pictured,
    save,
    shown_name,
    timing,
)
from kdfast.pruner.work import Work
from kdfast.pruning.constant import DropReport
from kdfast.pruning.keep import counted
from kdfast.pruning.latency import Latency, together
from kdfast.pruning.quality import Quality
from kdfast.pruning.tables import empty_table

if TYPE_CHECKING:
    from rich.table import Table

PRUNED = "pruned, not trained afterwards"


@dataclass(frozen=True)
class Point:
    """One pruned model of a sweep.

    Attributes:
        keep: What was asked for.
        folder: Where it is saved.
        chosen: What stayed.
        found: Its numbers.
        bytes: Of its weights on disk.
    """

    keep: int | float
    folder: Path
    chosen: Chosen
    found: Measured
    bytes: int

    @property
    def latency(self) -> Latency:
        """Of the accelerated model."""
        return self.found.latency["pruned, fused"]


def sweep(work: Work) -> None:
    """Prunes to every share of --sweep, and shows what each is worth and costs.

    Raises:
        UsageError: A share cannot be met.
    """
    options = work.options
    points = _points(work, sweep_folders(options))
    with asked(OSError):
        content = facts(options) | {
            "points": [
                {"keep": p.keep, "kept": p.chosen.heads, "folder": str(p.folder)}
                | {"params": p.found.params, **numbers(p.found, p.bytes)}
                for p in points
            ]
        }
        write_text(options.out / "sweep.json", json.dumps(content, indent=1) + "\n")
        drawn = draw_sweep(work, points, options.out / "sweep.png")
    _show(work, points, drawn)


def _points(work: Work, folders: dict[int | float, Path]) -> list[Point]:
    """Every pruned model, measured and saved; all are timed in the same rounds."""
    scores = scored(work)
    chosen = {keep: by_scores(work, scores, keep) for keep in folders}
    cuts = {keep: cut(work, choice) for keep, choice in chosen.items()}
    names = {keep: f"keep {keep:g}" for keep in folders}
    models = {names[keep]: model for keep, (model, _) in cuts.items()}
    times = together(work.model, models, work.images, work.options.rounds)
    points = []
    for keep, folder in folders.items():
        model, errors = cuts[keep]
        latency = {name: row for name, row in times.items() if name not in names.values()}
        latency["pruned, fused"] = times[names[keep]]
        found = measured(work, chosen[keep], model, latency)
        save(folder, work, chosen[keep], model, found, errors, DropReport([], {}))
        points.append(Point(keep, folder, chosen[keep], found, file_bytes(folder)))
    return points


def _show(work: Work, points: list[Point], drawn: bool) -> None:
    from rich.console import Console

    console, first = Console(), points[0].found
    title = f"{shown_name(work.options)}, {pictured(first, work.images)}"
    console.print(sweep_table(work, points, title))
    console.print(timing(first.latency, work.options.rounds), highlight=False)
    console.print(f"quality: {judged(work)}", highlight=False)
    if first.quality is not None and first.quality.agreement is not None:
        console.print("agree: share of them in the class that the original gives", highlight=False)
    for point in points:
        print(point.folder)
    print(work.options.out / "sweep.json")
    if drawn:
        print(work.options.out / "sweep.png")
    middle = points[len(points) // 2]
    print(f"to win back what one of them lost:\n{next_command(work, middle.folder)}")


def sweep_table(work: Work, points: list[Point], title: str) -> Table:
    """One row for the original, which is accelerated too, and one for every point."""
    found = points[0].found
    base = found.latency.get("before, fused", found.latency["before"])
    columns = ["keep", "heads", "params", "MB", "ms", "faster"]
    quality = found.quality
    names = _names(quality)
    table = empty_table(title, [*columns, *names])
    whole = _cells(quality, names, original=True)
    heads, params = f"{sum(work.heads):,}", f"{found.report.full.params / 1e6:.2f}M"
    size = f"{found.original_bytes / 1e6:.1f}"
    table.add_row("all", heads, params, size, f"{base.ms:.2f}", "", *whole)
    for p in points:
        kept = sum(map(len, p.chosen.heads))
        share = f"{kept:,} ({100 * kept / max(1, sum(work.heads)):.0f} %)"
        speed = f"{base.ms / p.latency.ms:.2f}x"
        cells = [share, f"{p.found.params / 1e6:.2f}M", f"{p.bytes / 1e6:.1f}"]
        cells += [f"{p.latency.ms:.2f}", speed, *_cells(p.found.quality, names)]
        table.add_row(f"{p.keep:g}", *cells)
    return table


def _names(quality: Quality | None) -> list[str]:
    """Columns of the quality that was measured."""
    if quality is None:
        return []
    values = {"cosine": quality.cosine, "agree": quality.agreement, "top-1": quality.accuracy}
    return [name for name, value in values.items() if value is not None]


def _cells(quality: Quality | None, names: list[str], *, original: bool = False) -> list[str]:
    if quality is None:
        return []
    top1 = quality.original if original else quality.accuracy
    values = {"cosine": quality.cosine, "agree": quality.agreement}
    if original:
        values = {"cosine": 1.0, "agree": 1.0}
    shares = {name: f"{value or 0:.3f}" for name, value in {**values, "top-1": top1}.items()}
    return [shares[name] for name in names]


def draw_sweep(work: Work, points: list[Point], path: Path) -> bool:
    """Writes a PNG of quality over measured latency; whether there was a quality to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quality = points[0].found.quality
    if quality is None:
        return False
    name, _ = quality.main
    base = points[0].found.latency
    whole = (base.get("before, fused", base["before"]).ms, 100 * _whole(quality))
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = [(p.latency.ms, 100 * p.found.quality.main[1]) for p in points if p.found.quality]
    spread = [p.latency.iqr / 2 for p in points if p.found.quality]
    axes.axhline(whole[1], color="black", linewidth=1, linestyle=":")
    xs, ys = ([place[axis] for place in places] for axis in (0, 1))
    axes.errorbar(xs, ys, xerr=spread, fmt="o-", capsize=3, label=PRUNED)
    axes.plot(*whole, "s", color="black", label="original, accelerated")
    for p, place in zip(points, places, strict=True):
        kept = counted(p.chosen.heads, work.heads)
        kept = kept.replace(" in every block", "").replace(" in all blocks", "")
        _label(axes, f"keep {p.keep:g}: {kept}", place)
    _label(axes, "original", whole)
    ends = [
        (x + side, y) for (x, y), half in zip(places, spread, strict=True) for side in (-half, half)
    ]
    _frame(axes, [*ends, whole], name)
    axes.set_title(f"{shown_name(work.options)}: {name} over latency", fontsize=11)
    axes.set_xlabel(f"median ms of {pictured(points[0].found, work.images)}, with quartiles")
    axes.legend(loc="best", fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
    return True


def _whole(quality: Quality) -> float:
    """The original's value of what ``Quality.main`` is: of an agreement with itself 1."""
    return 1.0 if quality.original is None else quality.original


def _label(axes: Any, text: str, place: tuple[float, float]) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    style: dict[str, Any] = {"fontsize": 8, "ha": "center", "va": "bottom", "bbox": box}
    axes.annotate(text, place, xytext=(0, 8), textcoords="offset points", **style)


def _frame(axes: Any, places: list[tuple[float, float]], name: str) -> None:
    """Limits with room for the labels and for the legend."""
    xs, ys = zip(*places, strict=True)
    room, height = 0.2 * (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 10.0
    axes.set_xlim(min(xs) - room, max(xs) + room)
    axes.set_ylim(min(ys) - 0.25 * height, max(ys) + 0.25 * height)
    axes.ticklabel_format(useOffset=False)
    axes.set_ylabel(f"{name}, % (higher is better)")
    axes.grid(alpha=0.3)
