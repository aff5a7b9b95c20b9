# SPDX-License-Identifier: Apache-2.0
"""Pictures of a chain: curves of a link, its confusion matrix, and the links side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from kdfast.chain.links import LinkModel
from kdfast.data.labelled import Classification
from kdfast.machine.files import replacing
from kdfast.pictures import capture, draw_heads, draw_rollout, prediction
from kdfast.trainer.logs import LOG, read_rows

DPI = 110
# Test images whose attention is drawn.
LOOKED_AT = 2
# Largest matrix whose cells are labelled with their counts.
LABELLED = 15
PANELS = (
    ("accuracy, %", "accuracy"),
    ("loss", "loss"),
    ("F1 (macro), %", "f1_score"),
    ("precision and recall (macro), %", "precision", "recall"),
)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curves(log: Path, path: Path, title: str, note: str) -> Path | None:
    """Accuracy, loss, F1, precision and recall of training and validation over the epochs.

    Args:
        log: The link's CSV.
        path: PNG file.
        title: Above the picture.
        note: Title of the loss, which differs between training and validation.
    """
    rows = read_rows(log) if log.is_file() else []
    if not rows:
        return None
    figure = _figure(9, 6)
    epochs = [int(row["epoch"]) for row in rows]
    for (label, *names), axes in zip(PANELS, figure.subplots(2, 2).flat, strict=True):
        for name, style in zip(names, ("-", "--"), strict=False):
            for split, colour in (("train", "tab:blue"), ("val", "tab:orange")):
                values = [float(row[f"{split}_{name}"]) for row in rows]
                text = split if len(names) == 1 else f"{split} {name}"
                axes.plot(epochs, values, style, color=colour, label=text, marker=".", ms=3)
        axes.set_title(f"{label} ({note})" if names == ["loss"] else label, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=DPI)
    return path


def draw_confusion(counts: Tensor, names: Sequence[str], path: Path, title: str) -> Path:
    """Share of every true class (rows) that was predicted as each class (columns).

    Args:
        counts: (C, C); or (C, 2, 2) of several labels per image, shown as one row a label.
        names: Names of the classes.
        path: PNG file.
        title: Above the picture.
    """
    columns = list(names)
    if counts.dim() == 3:
        counts, columns = counts.flatten(1), ["true neg.", "false pos.", "false neg.", "true pos."]
    table = counts.double().numpy()
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(12.0, 2.5 + 0.55 * len(names))
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, label="share of the true class")
    if len(names) <= LABELLED:
        for (row, column), value in np.ndenumerate(table):
            colour = "white" if share[row, column] > 0.5 else "black"
            text = f"{int(value)}" if value else ""
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    if len(names) <= 4 * LABELLED:
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("predicted" if len(columns) == len(names) else "")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=DPI)
    return path


def draw_comparison(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Test accuracy and macro F1 of every link as bars from zero, and the gaps between them.

    Several seeds are dots, and their spread is a line; one seed has neither.

    Args:
        rows: Rows as ``compare`` makes them, with ``values`` of each seed.
        path: PNG file.
        title: Above the picture.
    """
    figure = _figure(max(9.0, 2.6 * len(rows)), 4.6)
    panels = (("test_accuracy", "test accuracy, %"), ("test_f1_score", "test F1 (macro), %"))
    for axes, (name, text) in zip(figure.subplots(1, 2), panels, strict=True):
        _draw_bars(axes, rows, name)
        axes.set_title(f"{text}\n{_gaps(rows, name)}".strip(), fontsize=9)
    figure.suptitle(f"{title}, {_seeds(rows)}")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=DPI)
    return path


def _draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    colours = ["tab:gray", "tab:purple", "tab:blue", "tab:orange", "tab:green", "tab:brown"]
    tops = []
    for i, row in enumerate(rows):
        values, mean, spread = row["values"][name], row["mean"][name], row["spread"][name]
        axes.bar(i, mean, yerr=spread, color=colours[i % len(colours)], alpha=0.6, capsize=5)
        text = f"{mean:.2f}"
        if spread is not None:
            axes.plot([i] * len(values), values, "k.", ms=5)
            text += f" ± {spread:.2f}"
        tops.append(max([mean + (spread or 0.0), *values]))
        axes.text(i, tops[-1], text, fontsize=8, ha="center", va="bottom")
    axes.set_xticks(range(len(rows)), [_named(row) for row in rows], fontsize=7.5)
    # Room for the numbers; percentages end at 100.
    axes.set_ylim(0, min(108.0, 1.12 * max(tops)))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _named(row: Mapping[str, Any]) -> str:
    """Role, model, in lines as narrow as a bar, and size."""
    model = textwrap.fill(row["model"].replace("_", " "), 14).replace(" ", "_")
    return f"{row['role']}\n{model}\n{row['params'] / 1e6:.2f}M"


def _gaps(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """How far the student is from its teachers and from its twin, in points."""
    means = {row["role"]: row["mean"][name] for row in rows}
    if "student" not in means:
        return ""
    gaps = {role: means["student"] - mean for role, mean in means.items() if role != "student"}
    words = ", ".join(f"{role} {gap:+.2f}" for role, gap in gaps.items())
    return f"student against {words}" if words else ""


def _seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = sorted({len(row["seeds"]) for row in rows})
    if counts == [1]:
        return "one seed"
    return f"mean and spread of {' or '.join(map(str, counts))} seeds"


def _seen_as(target: Tensor, logits: Tensor, data: Classification) -> str:
    """Label and prediction of an image, in words."""
    names = data.class_names
    if data.task != "multilabel":
        return f"label {names[int(target)]}, predicted {prediction(logits, names)}"
    pairs = (("labels", target > 0.5), ("predicted", logits > 0))
    return ", ".join(
        f"{what} {' + '.join(names[i] for i in found.nonzero().flatten()) or 'none'}"
        for what, found in pairs
    )


def draw_attention(
    student: LinkModel, data: Classification, folder: Path, title: str, device: torch.device
) -> list[Path]:
    """Rollout, and the heads of the last layer, for the first test images.

    Args:
        student: A trained link.
        data: Its images.
        folder: Where the pictures go.
        title: Above each of them.
        device: Where the model is.

    Returns:
        The pictures; none for a model whose attention cannot be read, which the log says.
    """
    items = [data.test[i] for i in range(min(LOOKED_AT, len(data.test)))]
    images = student.prepared(torch.stack([item["image"] for item in items]).to(device))
    try:
        seen = capture(student.net, images, images * student.std + student.mean)
    except (NotImplementedError, TypeError, ValueError) as error:
        LOG.info("no pictures of attention: %s", error)
        return []
    paths = []
    for i, item in enumerate(items):
        name = f"{title}\ntest image {i}"
        if seen.output is not None:
            name += f": {_seen_as(item['target'], seen.output[i].cpu(), data)}"
        paths.append(draw_rollout(seen, folder / f"attention{i}_rollout.png", image=i, title=name))
        paths.append(draw_heads(seen, folder / f"attention{i}_heads.png", image=i, title=name))
    return paths
