# SPDX-License-Identifier: Apache-2.0
"""The table and the picture at the end of a run: teacher, pruned, compensated and distilled."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.table import Table
from torch import Tensor, nn

from kdfast.data.views.preprocess import MEAN, STD
from kdfast.machine.files import replacing, write_text
from kdfast.machine.memory import peak_bytes
from kdfast.machine.timing import inference_calls, interleave, summarize
from kdfast.ops._packed import packed_bytes
from kdfast.pruning import pruning_report
from kdfast.recovery.evaluate import confusion, mean_iou, similarity
from kdfast.trainer.tables import plain_text

# Samples per model in the final table: many for small models, few where a forward takes seconds.
ROUNDS, FEW_ROUNDS, PATIENCE_SECONDS = 9, 3, 20.0
# Pixels that a picture is at least wide in the sheet of predictions.
MIN_TILE = 320
# Pixels for the name of a class below it, and of a line of text.
LEGEND, LINE = 150, 24
FONT = 16
# What the colours of features mean.
EXPLAINED = (
    "colours: the three main directions (PCA) of the teacher's features as red, green and blue; ",
    "like colours are like features. Numbers: correlation with the teacher's features.",
)


@dataclass(frozen=True)
class Line:
    """One model of the final table.

    Attributes:
        model: Its name.
        quality: The held-out metric.
        heads: Attention heads of all blocks.
        params: Parameters of the backbone.
        gmac: Billions of multiply-adds of the backbone for one image, matrix products only.
        ms: Median milliseconds of the backbone for one image.
        peak_mib: Weights, packed copies of them, and the highest memory of one forward, in MiB.
    """

    model: str
    quality: float
    heads: int
    params: int
    gmac: float
    ms: float
    peak_mib: float


def measure(
    models: Mapping[str, nn.Module],
    quality: Mapping[str, float],
    image: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[Line]:
    """Size, cost and speed of backbones, timed in turns on the same image.

    Args:
        models: By name, in eval mode, on the image's device.
        quality: The held-out metric of each.
        image: (1, 3, H, W).
        autocast: Gives the context that the run's precision asks for.
    """
    calls = inference_calls(models, image, autocast)
    # The measurement of memory is also the second warm-up; the first one packs weights.
    began = time.monotonic()
    for forward in calls.values():
        forward()
    peaks = {name: peak_bytes(forward, image.device) for name, forward in calls.items()}
    slow = (time.monotonic() - began) * (ROUNDS / 2 + 1) > PATIENCE_SECONDS
    samples = interleave(calls, rounds=FEW_ROUNDS if slow else ROUNDS, warmup=0 if slow else 2)
    height, width = image.shape[-2:]
    lines = []
    for name, model in models.items():
        cost = pruning_report(model, (), image_size=(height, width)).full
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        weights += packed_bytes(model)
        lines.append(
            Line(
                model=name,
                quality=quality[name],
                heads=cost.heads,
                params=cost.params,
                gmac=cost.flops / 2e9,
                ms=summarize(samples[name])["ms"],
                peak_mib=(weights + peaks[name]) / 2**20,
            )
        )
    return lines


def recovery(lines: Sequence[Line]) -> dict[str, float]:
    """Part of the quality lost by pruning that every later model has back; empty if none was lost.

    Args:
        lines: The teacher, the pruned student, and what was made of it.
    """
    teacher, pruned, *later = lines
    lost = teacher.quality - pruned.quality
    return {x.model: (x.quality - pruned.quality) / lost for x in later} if lost > 0 else {}


def table(lines: Sequence[Line], metric: str) -> Table:
    """The lines for the terminal."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head(metric):
        result.add_column(name, justify="left" if name == "model" else "right")
    for line in lines:
        result.add_row(*cells(line))
    return result


def head(metric: str) -> list[str]:
    """Names of the table's columns."""
    return ["model", metric, "heads", "parameters", "GMACs", "ms / image", "peak MiB"]


def cells(line: Line) -> list[str]:
    """A line as it is shown."""
    return [
        line.model,
        f"{line.quality:.4f}",
        str(line.heads),
        f"{line.params:,}",
        f"{line.gmac:.3f}",
        f"{line.ms:.2f}",
        f"{line.peak_mib:.1f}",
    ]


def write_report(folder: Path, lines: Sequence[Line], metric: str, facts: dict[str, object]) -> str:
    """Save the lines as ``report.json`` and ``report.txt``; returns the text of the table."""
    parts = recovery(lines)
    content = {"metric": metric, "recovered": parts, **facts, "models": [asdict(x) for x in lines]}
    write_text(folder / "report.json", json.dumps(content, indent=1) + "\n")
    lost = lines[0].quality - lines[1].quality
    if parts:
        shares = ", ".join(f"{name} has back {part:.0%}" for name, part in parts.items())
        note = f"pruning lost {lost:.4f} {metric}; of it {shares}"
    else:
        note = f"pruning lost no {metric}"
    text = f"{plain_text(table(lines, metric))}\n\n{note}"
    write_text(folder / "report.txt", text + "\n")
    return text


@torch.no_grad()
def draw_predictions(
    path: Path,
    models: Mapping[str, nn.Module],
    head: nn.Module | None,
    images: Tensor,
    labels: Tensor | None,
    palette: Mapping[str, tuple[int, int, int]],
) -> Path:
    """Picture with a row per view: the image, its label, and what every model makes of it.

    Each tile of a model has its score on that view: mean IoU, or without labels the correlation
    with the teacher's features. Below are the names of the classes in their colours, or what the
    colours of features mean.

    Args:
        path: PNG file.
        models: Backbones by name, the teacher first.
        head: Labels pixels; None: the three main directions of the teacher's features are shown
            as red, green and blue.
        images: (B, 3, H, W) normalised.
        labels: (B, H, W), or None.
        palette: RGB of each class by its name, in their order.
    """
    colours = list(palette.values())
    columns: dict[str, list[NDArray[np.uint8]]] = {"image": _pictures(images)}
    if labels is not None:
        columns["label"] = _painted(labels, colours)
    features = {name: model.eval()(images) for name, model in models.items()}
    scores: dict[str, list[float | None]] = {}
    if head is not None:
        for name, value in features.items():
            logits = head(value)
            columns[name] = _painted(logits.argmax(1), colours)
            if labels is not None:
                scores[name] = _ious(logits, labels)
    else:
        columns |= _components(features)
        first = next(iter(features.values()))
        scores = {name: _likeness(value, first) for name, value in features.items()}
    _grid(path, columns, scores, palette if head is not None else {})
    return path


def _ious(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Mean IoU of every view; None for one without a label."""
    classes = logits.shape[1]
    counts = [confusion(a[None], b[None], classes) for a, b in zip(logits, labels, strict=True)]
    return [mean_iou(count) if count.any() else None for count in counts]


def _likeness(features: Tensor, teacher: Tensor) -> list[float | None]:
    """Mean correlation of every view's features with the teacher's."""
    positions = features[0, 0].numel()
    pairs = zip(features, teacher, strict=True)
    return [float(similarity(a[None], b[None])) / positions for a, b in pairs]


def _pictures(images: Tensor) -> list[NDArray[np.uint8]]:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    pixels = (images.cpu().float() * std + mean).clamp(0, 255).byte()
    return [picture.permute(1, 2, 0).numpy() for picture in pixels]


def _painted(labels: Tensor, palette: Sequence[tuple[int, int, int]]) -> list[NDArray[np.uint8]]:
    colours = torch.tensor([*palette, (0, 0, 0)], dtype=torch.uint8)
    known = labels.cpu().where((labels.cpu() >= 0) & (labels.cpu() < len(palette)), len(palette))
    return [colours[label].numpy() for label in known]


def _components(features: Mapping[str, Tensor]) -> dict[str, list[NDArray[np.uint8]]]:
    """Projections on the first three principal directions of the first model, as colours."""
    rows = {name: x.float().movedim(1, -1) for name, x in features.items()}
    first = next(iter(rows.values()))
    flat = first.flatten(0, -2)
    centre = flat.mean(0)
    _, _, basis = torch.pca_lowrank(flat - centre, q=3)
    low, high = (torch.quantile((flat - centre) @ basis, q, dim=0) for q in (0.02, 0.98))
    return {
        name: [
            (((x - centre) @ basis - low) / (high - low)).clamp(0, 1).mul(255).byte().cpu().numpy()
            for x in value
        ]
        for name, value in rows.items()
    }


def _grid(
    path: Path,
    columns: Mapping[str, list[NDArray[np.uint8]]],
    scores: Mapping[str, list[float | None]],
    legend: Mapping[str, tuple[int, int, int]],
) -> None:
    """Tile pictures of one size, or of sizes that divide the first column's, with titles."""
    height, width = next(iter(columns.values()))[0].shape[:2]
    zoom = max(1, -(-MIN_TILE // width))
    tile = (width * zoom, height * zoom)
    count = len(next(iter(columns.values())))
    width, bottom = len(columns) * tile[0], LINE + count * tile[1]
    per_line = max(1, width // LEGEND)
    lines = -(-len(legend) // per_line) if legend else len(EXPLAINED)
    sheet = Image.new("RGB", (width, bottom + lines * LINE), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT)
    for i, (name, colour) in enumerate(legend.items()):
        x, y = i % per_line * LEGEND, bottom + i // per_line * LINE
        draw.rectangle((x + 4, y + 5, x + 18, y + 19), fill=colour, outline="black")
        draw.text((x + 24, y + 3), name, fill="black", font=font)
    for i, text in enumerate(() if legend else EXPLAINED):
        draw.text((4, bottom + i * LINE + 3), text, fill="black", font=font)
    for column, (name, pictures) in enumerate(columns.items()):
        draw.text((column * tile[0] + 4, 3), name, fill="black", font=font)
        for row, picture in enumerate(pictures):
            x, y = column * tile[0], LINE + row * tile[1]
            sheet.paste(Image.fromarray(picture).resize(tile, Image.Resampling.NEAREST), (x, y))
            if name in scores and (score := scores[name][row]) is not None:
                draw.rectangle((x + 4, y + tile[1] - 24, x + 54, y + tile[1] - 4), fill="white")
                draw.text((x + 8, y + tile[1] - 23), f"{score:.3f}", fill="black", font=font)
    with replacing(path) as partial:
        sheet.save(partial)
