# SPDX-License-Identifier: Apache-2.0
"""The end of a distillation: a table, its files, and pictures of quality and attention."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table
from torch import Tensor

from kdfast.distillation.evaluate import MEANING, Quality
from kdfast.distillation.terms import Terms
from kdfast.machine.files import replacing, write_text
from kdfast.machine.timing import inference_calls, interleave, summarize
from kdfast.models.prepared import PreparedModel
from kdfast.pictures import Attentions, capture
from kdfast.pictures.draw import rollout_map
from kdfast.pictures.page import picture
from kdfast.pruning import pruning_report
from kdfast.trainer.logs import LOG
from kdfast.trainer.report_page import PAGE, Grid, Picture, Section, write_page
from kdfast.trainer.tables import plain_text
from kdfast.trainer.watch import Row

ROUNDS = 9
DPI = 110
# Of the rows of the table.
TEACHER, BEFORE, AFTER = "teacher", "student before", "distilled"
# Held-out pictures whose attention is drawn.
LOOKED_AT = 3


@dataclass(frozen=True)
class Line:
    """One model of the table.

    Attributes:
        model: What it is.
        quality: Its numbers by their names.
        heads: Attention heads of all blocks; None where the model's family is not known.
        params: Parameters.
        gmac: Billions of multiply-adds for one picture, matrix products only; None as ``heads``.
        ms: Median milliseconds for one picture.
    """

    model: str
    quality: Quality
    heads: int | None
    params: int
    gmac: float | None
    ms: float


def measured(
    models: Mapping[str, PreparedModel],
    quality: Mapping[str, Quality],
    image: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[Line]:
    """Size, cost and speed of models, timed in turns on the same picture.

    Args:
        models: "teacher" and "distilled", in eval mode; the student before has the latter's cost.
        quality: Of the rows of the table, by name.
        image: (1, 3, H, W) in [0, 1].
        autocast: Gives the context that the run's precision asks for.
    """
    samples = interleave(inference_calls(models, image, autocast), rounds=ROUNDS)
    lines = []
    for name, numbers in quality.items():
        of = name if name in models else AFTER
        net, (height, width) = models[of].net, models[of].size or tuple(image.shape[-2:])
        params = sum(p.numel() for p in net.parameters())
        heads = gmac = None
        try:
            cost = pruning_report(net, (), image_size=(height, width)).full
            heads, gmac = cost.heads, cost.flops / 2e9
        except TypeError as error:
            LOG.info("%s: its heads and multiply-adds are not counted: %s", of, error)
        lines.append(Line(name, numbers, heads, params, gmac, summarize(samples[of])["ms"]))
    return lines


def write_report(folder: Path, lines: Sequence[Line], facts: Mapping[str, Any]) -> str:
    """Save the lines as ``report.json`` and ``report.txt``; returns the text of the latter."""
    back = {name: part for name in MEANING if (part := won_back(lines, name)) is not None}
    content = {**facts, "won_back": back, "models": [asdict(line) for line in lines]}
    write_text(folder / "report.json", json.dumps(content, indent=1) + "\n")
    rows = [plain_text(table(lines)), "", *meanings(lines)]
    rows += ["", *(_in_words(name, part) for name, part in back.items())] if back else []
    text = "\n".join(rows)
    write_text(folder / "report.txt", text + "\n")
    return text


def write_distil_page(
    folder: Path, lines: Sequence[Line], terms: Terms, config: Mapping[str, Any]
) -> Path:
    """Write ``report.html``: the table and the pictures of a finished distillation on one page.

    Args:
        folder: Of the run, with its pictures.
        lines: Of the table.
        terms: What was compared.
        config: Plain values of the options.
    """
    back = [
        _in_words(name, part) for name in MEANING if (part := won_back(lines, name)) is not None
    ]
    grid = Grid(head(lines), [cells(line) for line in lines], "; ".join(meanings(lines)))
    words = [f"{terms.kinship[:1].upper()}{terms.kinship[1:]}."]
    words += [f"Left out: {name}, since {why}." for name, why in terms.left_out.items()]
    captions = {
        "quality.png": "Held-out numbers over the epochs",
        "attention.png": "Where teacher and student look",
        "curves.png": "The losses",
    }
    pictures = [
        Picture(folder / name, caption)
        for name, caption in captions.items()
        if (folder / name).is_file()
    ]
    return write_page(
        folder / PAGE,
        title="kdfast: distillation",
        lead="; ".join(back).capitalize() or "The student had lost nothing that was measured",
        sections=[
            Section("Models", " ".join(words), grids=[grid]),
            Section("Pictures", pictures=pictures),
        ],
        config=config,
    )


def meanings(lines: Sequence[Line]) -> list[str]:
    """What the numbers of the table are."""
    return [f"{name}: {MEANING[name]}" for name in lines[0].quality]


def won_back(lines: Sequence[Line], name: str) -> float | None:
    """Part of what the student lacked of the teacher that it has now; None where it lacked none."""
    values = {line.model: line.quality.get(name) for line in lines}
    teacher, before, after = values[TEACHER], values[BEFORE], values[AFTER]
    if teacher is None or before is None or after is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


def _in_words(name: str, part: float) -> str:
    if part <= 0:
        return f"nothing of the {name} that was lost is back"
    return f"of the {name} that was lost {part:.0%} is back"


def table(lines: Sequence[Line]) -> Table:
    """The lines for the terminal."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in head(lines):
        result.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for line in lines:
        result.add_row(*cells(line))
    return result


def head(lines: Sequence[Line]) -> list[str]:
    """Names of the table's columns."""
    return ["model", *lines[0].quality, "heads", "parameters", "GMACs", "ms"]


def cells(line: Line) -> list[str]:
    """A line as it is shown."""
    return [
        line.model,
        *(f"{value:.4f}" for value in line.quality.values()),
        "" if line.heads is None else str(line.heads),
        f"{line.params:,}",
        "" if line.gmac is None else f"{line.gmac:.3f}",
        f"{line.ms:.2f}",
    ]


def draw_quality(
    path: Path, rows: Sequence[Row], before: Mapping[str, Quality], title: str
) -> Path:
    """The held-out numbers over the epochs, from before the training on."""
    names = list(before["student"])
    figure = Figure(figsize=(3.6 * max(len(names), 2), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        values = [before["student"][name], *(float(row[name]) for row in rows)]
        axes.plot(range(len(values)), values, marker=".", label="student")
        if name in before["teacher"]:
            axes.axhline(before["teacher"][name], color="tab:gray", ls="--", label="teacher")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch; 0 is before the training")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=DPI)
    return path


def looked_at(model: PreparedModel, images: Tensor) -> Attentions | None:
    """Where a model looks in some pictures; None, with a word in the log, where it cannot be read.

    Args:
        model: In any mode.
        images: (B, 3, H, W) in [0, 1].
    """
    try:
        return capture(model.net, model.prepared(images))
    except (NotImplementedError, TypeError, ValueError) as error:
        LOG.info("no pictures of attention: %s", error)
        return None


def draw_looks(path: Path, seen: Mapping[str, Attentions], title: str) -> Path:
    """Rollout of attention, a row for each picture and a column for each model.

    Args:
        path: PNG file.
        seen: Of the models by name, the same pictures.
        title: Above the sheet.
    """
    maps = {name: rollout_map(some) for name, some in seen.items()}
    first = next(iter(seen.values()))
    count, columns = len(first.images), 1 + len(seen)
    figure = Figure(figsize=(2.1 * columns, 2.1 * count + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(count, columns, squeeze=False)
    drawn: Any = None
    top = max(float(some.max()) for some in maps.values())
    for row in range(count):
        panels[row][0].imshow(picture(first, row))
        for axes, some in zip(panels[row][1:], maps.values(), strict=True):
            drawn = axes.imshow(some[row], cmap="magma", vmin=0, vmax=top)
        for axes in panels[row]:
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, name in zip(panels[0], ("picture", *seen), strict=True):
        axes.set_title(name, fontsize=10)
    figure.colorbar(drawn, ax=panels, shrink=0.6, label="attention, times the mean")
    figure.suptitle(title, fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=DPI)
    return path
