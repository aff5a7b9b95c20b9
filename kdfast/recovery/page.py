# SPDX-License-Identifier: Apache-2.0
"""The page about a pruning run, made of the files that the run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdfast.configs import plain
from kdfast.configs.recovery import Config
from kdfast.recovery.report import Line, cells, head
from kdfast.trainer.report_page import PAGE, Grid, Picture, Section, write_page

# Picture of the head scores, which a run draws when it has chosen by them.
SCORES = "head_scores.png"
# Columns of the table of boxes and lanes, as ``frames.json`` names them.
FRAMES = ("mAP", "map mAP", "translation", "scale", "orientation", "velocity")


def write_run_page(folder: Path, config: Config) -> Path:
    """Write ``report.html`` of a finished run.

    Args:
        folder: Folder of the run.
        config: The run.
    """
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    metric, lines = report["metric"], [Line(**model) for model in report["models"]]
    note = (
        "Backbones alone; GMACs (billions of multiply-adds) and milliseconds are of one image, on "
        "the machine named below."
    )
    grid = Grid(head(metric), [cells(line) for line in lines], note)
    sections = [Section("Models", grids=[grid])]
    frames = folder / "frames.json"
    if frames.is_file():
        sections.append(_frames(json.loads(frames.read_text(encoding="utf-8"))))
    sections += [
        Section(
            "What the models see",
            pictures=[
                Picture(folder / "predictions.png", "Held-out images and every model's view")
            ],
        ),
        Section(
            "Training",
            pictures=[
                Picture(folder / "curves.png", f"Losses, {metric} on held-out images, and speed")
            ],
        ),
    ]
    scores = folder / SCORES
    if scores.is_file():
        caption = "Scores of the teacher's heads; removed ones are crossed out"
        sections.append(Section("Heads", pictures=[Picture(scores, caption)]))
    teacher = folder / "teacher" / "curves.png"
    if teacher.is_file():
        shown = [Picture(teacher, "Training of the teacher")]
        sections.append(Section("The teacher's training", pictures=shown, folded=True))
    return write_page(
        folder / PAGE,
        title=f"kdfast: {config.name}",
        lead=_lead(metric, lines, report["recovered"]),
        note=config.note,
        sections=sections,
        config=plain(config),
    )


def _lead(metric: str, lines: list[Line], recovered: dict[str, float]) -> str:
    """The result in words."""
    teacher, last = lines[0], lines[-1]
    text = (
        f"{last.heads} of {teacher.heads} heads are left: {metric} {last.quality:.4f} "
        f"after distillation, {teacher.quality:.4f} of the teacher."
    )
    if recovered:
        shares = ", ".join(f"{name} {part:.0%}" for name, part in recovered.items())
        text += f" Of what pruning lost is back: {shares}."
    return text


def _frames(content: dict[str, Any]) -> Section:
    rows = [
        (name, *(f"{model[column]:.3f}" for column in FRAMES))
        for name, model in content["models"].items()
    ]
    text = f"On {content['frames']} held-out frames; errors of true positives, lower is better."
    return Section("Boxes and lanes", text, [Grid(("model", *FRAMES), rows)])
