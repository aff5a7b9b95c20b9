# SPDX-License-Identifier: Apache-2.0
"""What ``kdfast prune`` writes beside the model and prints at its end."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.configs.folder_kind import view_kind
from kdfast.machine.facts import cpu_name
from kdfast.machine.files import clear_partials, replacing_files, write_text
from kdfast.models.eva import EVAViT
from kdfast.ops._processor import processor
from kdfast.pruner.checks import asked
from kdfast.pruner.choose import Chosen
from kdfast.pruner.measure import Measured, file_bytes
from kdfast.pruner.work import Work
from kdfast.pruning.card import CARD, is_foreign
from kdfast.pruning.compensate import SiteError
from kdfast.pruning.constant import DropReport
from kdfast.pruning.folder import CONFIG
from kdfast.pruning.heat_map import draw_head_scores
from kdfast.pruning.latency import Latency
from kdfast.pruning.latency_goal import Goal, remarks
from kdfast.pruning.saving import save_pretrained
from kdfast.pruning.tables import costs, outcome, site_errors
from kdfast.sources import is_random

FILES = ("model.safetensors", CONFIG, "scores.json", "heads.png", "report.json")

# Times whose quartiles are further apart, as a share of the median, say little.
BUSY = 0.25


def save(
    out: Path,
    work: Work,
    chosen: Chosen,
    pruned: Any,
    found: Measured,
    errors: list[SiteError],
    dropped: DropReport,
) -> None:
    """The model's folder: weights, configuration, scores with their picture, and the report."""
    with asked(OSError, ValueError):
        out.mkdir(parents=True, exist_ok=True)
        clear_partials(out)
        with replacing_files(out, last=CONFIG) as folder:
            times = {f"ms, {name}": value.ms for name, value in found.latency.items()}
            save_pretrained(pruned, folder, metrics=times)
            if is_foreign(out / CARD):
                (folder / CARD).unlink()
            chosen.scores.save(folder / "scores.json")
            draw_head_scores(chosen.scores, chosen.heads, folder / "heads.png")
            content = facts(work.options) | {
                "kept": chosen.heads,
                "units": None if chosen.units is None else [len(row) for row in chosen.units],
                "dropped": dropped.dropped,
                "errors": [error._asdict() for error in errors],
                "goal": None if chosen.outcome is None else chosen.outcome.facts(),
                **numbers(found, file_bytes(folder)),
                "cost": json.loads(found.report.to_json()),
            }
            write_text(folder / "report.json", json.dumps(content, indent=1) + "\n")


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """The request and the machine, for a report."""
    return {
        "request": {name: str(value) for name, value in vars(options).items()},
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "family": processor().name,
        "date": time.strftime("%Y-%m-%d"),
    }


def numbers(found: Measured, size: int) -> dict[str, Any]:
    """Times, bytes and quality, for a report."""
    return {
        "latency_ms": {name: row._asdict() for name, row in found.latency.items()},
        "bytes": {"before": found.original_bytes, "after": size},
        "quality": None if found.quality is None else found.quality._asdict(),
    }


def show(
    work: Work,
    chosen: Chosen,
    found: Measured,
    errors: Sequence[SiteError],
    dropped: DropReport,
    images: Tensor,
) -> None:
    """The tables, the paths and the next command."""
    from rich.console import Console

    options, console = work.options, Console()
    if errors:
        console.print(site_errors(errors))
    size = file_bytes(options.out)
    bytes_ = (found.original_bytes, size)
    what = pictured(found, images)
    name = shown_name(options)
    report, latency = found.report, found.latency
    console.print(costs(report, latency, name, found.params, what, bytes_, found.quality))
    console.print(timing(latency, options.rounds), highlight=False)
    console.print(f"quality: {judged(work)}", highlight=False, soft_wrap=False)
    if chosen.outcome is not None:
        console.print(outcome(chosen.outcome))
        goal = Goal(options.speedup, options.latency_ms)
        for line in remarks(chosen.outcome, goal, dropped):
            console.print(line, highlight=False)
    for file in FILES:
        print(options.out / file)
    print(f"to win back what it lost:\n{next_command(work, options.out)}")


def shown_name(options: argparse.Namespace) -> str:
    """The model's name for titles: of a path its last part."""
    path = Path(options.model)
    return path.name if path.exists() else str(options.model)


def pictured(found: Measured, images: Tensor) -> str:
    """What the times are of, in words."""
    side = "x".join(map(str, found.report.image_size))
    kind = str(images.dtype).removeprefix("torch.")
    what = f"one {side} image" if len(images) == 1 else f"{len(images)} {side} images"
    return what if kind == "float32" else f"{what} in {kind}"


def timing(latency: dict[str, Latency], rounds: int) -> str:
    """How the times were taken, in words."""
    spread = max(value.iqr / value.ms for value in latency.values())
    busy = " (the machine is busy: time again with it alone)" if spread > BUSY else ""
    count = torch.get_num_threads()
    return (
        f"times: medians of {rounds} alternating rounds on {cpu_name()}, {processor().name}, "
        f"{count} thread{'s' * (count > 1)}; quartiles within {spread:.0%}{busy}"
    )


def judged(work: Work) -> str:
    """What the quality is measured on, in words."""
    if work.judged is None:
        return "not measured; --data FOLDER has pictures for it"
    if work.judged.labels is not None:
        return f"{work.judged.origin}; with their classes"
    return work.judged.origin


def next_command(work: Work, out: Path) -> str:
    """The command that trains the pruned model to do what the original did."""
    options = work.options
    if isinstance(work.model, EVAViT):
        words = ["kdfast", "train", "--config", "orion50"]
        changes = {"teacher.checkpoint": options.checkpoint or options.model}
        changes["prune.heads"] = out / "report.json"
        if options.mlp_keep is not None:
            changes["prune.mlp_keep"] = options.mlp_keep
        if options.data is not None:
            kind = view_kind(str(options.data)) or "images"
            changes |= {"data.kind": kind, "data.root": options.data}
        return shlex.join([*words, *(w for k, v in changes.items() for w in ("--set", f"{k}={v}"))])
    words = ["kdfast", "distill", "--teacher", str(options.model)]
    if options.checkpoint is not None:
        words += ["--teacher-checkpoint", options.checkpoint]
    words += ["--pretrained"] * options.pretrained
    if options.seed and is_random(options.model, options.checkpoint, pretrained=options.pretrained):
        words += ["--seed", str(options.seed)]
    words += ["--student", str(out), "--data", str(options.data or "PICTURES")]
    if work.judged is not None and work.judged.labels is not None:
        words.append("--labels")
    return shlex.join(words)
