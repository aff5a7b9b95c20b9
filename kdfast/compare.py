# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.compare``: your model on this machine, run in every way that people pick.

See docs/use/compare.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from kdfast.commandline.compare import EXTRA, parser
from kdfast.machine.facts import machine_facts
from kdfast.machine.files import clear_partials, write_text
from kdfast.machine.signals import handled, run_command
from kdfast.pruning import head_scores, prune_heads, select_heads
from kdfast.resolve import class_count
from kdfast.rivals import RIVALS
from kdfast.rivals.picture import draw
from kdfast.rivals.race import ROUNDS, Race
from kdfast.rivals.report import lines, notes, table
from kdfast.rivals.results import Row, answers, row_of
from kdfast.sources import (
    SourceError,
    image_batches,
    is_place,
    is_random,
    load_model,
    load_saved,
    picture_size,
)

PACKAGES = ("matplotlib", "rich", "cv2")  # picture, table, pictures of folders and scenes
CALIBRATION = 16


class UsageError(Exception):
    """The request cannot be met; the message, one line, says what the user has to change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 for a request that cannot be met, 130 after Ctrl-C."""
    options = parser().parse_args(argv)
    return run_command(lambda: guarded(options), "rows without numbers were not measured")


def guarded(options: argparse.Namespace) -> int:
    """The command after its command line: a request that cannot be met is one line."""
    try:
        return run(options)
    except (UsageError, SourceError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """All steps, from the model to the files, which are written after Ctrl-C too."""
    check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = chosen(options)
    subjects = {"whole": model, **pruned(model, options)}
    batches, calibration, count = pictures(model, options)
    rivals = [RIVALS[name] for name in RIVALS if wanted(name, options)]
    facts = introduce(options, subjects, count)
    reference = answers(model, batches)
    with Race(subjects, rivals, batches, calibration, torch.get_num_threads()) as race:
        stopped = measure(race, options.seconds)
        rows = [
            row_of(contender, reference, options.batch, count, class_count(model) > 1)
            for contender in race.contenders
        ]
    show(rows, facts, options)
    if stopped is not None:
        raise stopped
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises UsageError for a request that no model could meet."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"missing packages: {', '.join(missing)}; pip install 'kdfast[train]'")
    for name in ("batch", "pictures", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}: must be at least 1, got {value}")
    if not options.seconds > 0:
        raise UsageError(f"--seconds: must be above 0, got {options.seconds}")
    if not 0 <= options.prune < 1:
        raise UsageError(f"--prune: must be a share in [0, 1), got {options.prune}")
    if options.data and not is_place(options.data):
        raise UsageError(f"--data: must be a folder, got {options.data}")
    if not any(wanted(name, options) for name in RIVALS):
        raise UsageError("--skip: leaves no candidate")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        clear_partials(options.out)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        raise UsageError(f"--out: {options.out} cannot be written: {error.strerror}") from error


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether a candidate is to run."""
    asked = name not in EXTRA if options.only is None else name in options.only
    return asked and name not in options.skip


def chosen(options: argparse.Namespace) -> nn.Module:
    """The model of the command line, in fp32."""
    return load_model(options.model, options.checkpoint, pretrained=options.pretrained).float()


def pruned(model: nn.Module, options: argparse.Namespace) -> dict[str, nn.Module]:
    """The pruned model, if there is one, by its name."""
    if options.pruned is not None:
        return {"pruned": load_saved(options.pruned, "--pruned").float()}
    if not options.prune:
        return {}
    try:
        scores = head_scores(model, "magnitude")
        kept = select_heads(scores, 1 - options.prune)
        return {"pruned": prune_heads(model, kept).eval()}
    except (TypeError, ValueError) as error:
        print(f"no pruned model: {error}")
        return {}


def pictures(
    model: nn.Module, options: argparse.Namespace
) -> tuple[list[Tensor], list[Tensor], int]:
    """Batches to agree on, batches to calibrate on, and how many pictures the former hold.

    The last batches are filled with pictures that came before. No picture is in both, unless there
    is only one.
    """
    count = options.pictures + CALIBRATION
    size = picture_size(model)
    found = torch.cat(list(image_batches(model, size, options.data, count=count, batch_size=32)))
    # Of a small folder, a third calibrates.
    share = CALIBRATION if len(found) == count else min(CALIBRATION, max(1, len(found) // 3))
    chosen = torch.zeros(len(found), dtype=torch.bool)
    chosen[torch.arange(share) * len(found) // share] = True
    for_agreement = found[~chosen] if len(found) > 1 else found
    return (
        batched(for_agreement, options.batch),
        batched(found[chosen], options.batch),
        len(for_agreement),
    )


def batched(images: Tensor, batch: int) -> list[Tensor]:
    """Pictures in batches of one size; the last is filled from the beginning."""
    rounded = -(-len(images) // batch) * batch
    index = torch.arange(rounded) % len(images)
    return list(images[index].unflatten(0, (-1, batch)).contiguous())


def introduce(
    options: argparse.Namespace, subjects: dict[str, nn.Module], count: int
) -> dict[str, Any]:
    """Prints what is compared, and returns it together with the facts of the machine."""
    machine = machine_facts()
    random = is_random(options.model, options.checkpoint, pretrained=options.pretrained)
    source = str(options.data) if options.data else "rendered driving scenes, a stand-in"
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in subjects.items()}
    print(
        f"{options.model}: {sizes['whole']:,} parameters, {'random' if random else 'its'} weights"
    )
    if "pruned" in subjects:
        what = options.pruned or f"{options.prune:.0%} of the heads removed by magnitude"
        print(f"pruned: {what}, {sizes['pruned']:,} parameters")
    print(f"{count} picture{'s' * (count > 1)} to agree on: {source}")
    if random:
        print("note: with random weights agreement says little about trained ones (--pretrained)")
    print(f"{where(machine)}, batch {options.batch}\n")
    return {
        "machine": machine,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "model": options.model,
        "random_weights": random,
        "parameters": sizes,
        "pictures": source,
        "picture_count": count,
        "batch": options.batch,
        "request": {name: str(value) for name, value in vars(options).items()},
    }


def where(machine: dict[str, Any]) -> str:
    """The processor and the threads, in words."""
    count = machine["threads"]
    return f"{machine['cpu']} ({machine['family']}), {count} thread{'s' * (count > 1)}"


def measure(race: Race, seconds: float) -> KeyboardInterrupt | None:
    """Runs the race with a progress bar; what Ctrl-C raised if it stopped the race."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    heats = race.heats(psutil.virtual_memory().available)
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        total = len(race.contenders) * (2 + ROUNDS)
        bar = progress.add_task("exporting, compiling", total=total)
        if len(heats) > 1:
            progress.print(f"memory is short: {len(heats)} heats, one after the other")

        def say(step: str) -> Any:
            return lambda contender: progress.update(
                bar, advance=1, description=f"{step} {contender.name}"
            )

        for heat in heats:
            try:
                race.prepare(heat, say("prepared"))
                race.time(heat, seconds, say("timed"))
                race.finish(heat, say("finished"))
            except KeyboardInterrupt as stop:
                handled()
                race.finish(heat, say("finished"), complete=False)
                return stop
            race.clear()
    return None


def show(rows: Sequence[Row], facts: dict[str, Any], options: argparse.Namespace) -> None:
    """The table, what it says, and the paths of the files."""
    from rich.console import Console

    console = Console()
    console.print(table(rows))
    for line in (*notes(rows), "", *lines(rows)):
        console.print(line, highlight=False, soft_wrap=True)
    machine = facts["machine"]
    name = Path(options.model).name if Path(options.model).exists() else options.model
    title = f"{name}, batch {options.batch}\n{where(machine)}, torch {machine['torch']}"
    picture, numbers = options.out / "compare.png", options.out / "compare.json"
    content = {**facts, "rows": [asdict(row) for row in rows]}
    write_text(numbers, json.dumps(content, indent=1) + "\n")
    if draw(rows, picture, title):
        print(picture)
    print(numbers)


if __name__ == "__main__":
    sys.exit(main())
