# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.prune``: score, prune, save and time a ViT without writing code.

See docs/use/pruning.md.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.machine.facts import cpu_name
from kdfast.ops._processor import processor
from kdfast.pruning import (
    HeadScores,
    head_scores,
    mlp_scores,
    prune_heads,
    pruning_report,
    select_heads,
)
from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.heat_map import draw_head_scores
from kdfast.pruning.latency import Latency, latencies, leave_one_out_seconds
from kdfast.pruning.report import PruningReport
from kdfast.pruning.saving import CONFIG, save_pretrained
from kdfast.pruning.scores import METHODS
from kdfast.sources import MODEL_HELP, image_batches, is_random, load_model, noise

PACKAGES = ("matplotlib", "rich")  # for the heat map and the table
Selection = list[list[int]]  # positions that are kept, per block


class UsageError(Exception):
    """The request cannot be met; the message, one line, says what the user has to change."""


@contextmanager
def asked(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into UsageError.

    Only for code that does not run the model: the model's own errors keep their traceback.
    """
    try:
        yield
    except kinds as error:
        raise UsageError(str(error)) from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m kdfast.prune",
        description="Prunes the attention heads (and MLPs) of a ViT, saves it and times it.",
    )
    p.add_argument("--model", required=True, help=MODEL_HELP)
    p.add_argument("--out", required=True, type=Path, help="folder to write")
    p.add_argument("--keep", type=number, default=0.5, help="0.5: fraction; 6: heads per block")
    p.add_argument("--mlp-keep", type=number, help="the same for hidden units; all if left out")
    p.add_argument("--method", choices=METHODS, default="taylor", help="score of a head")
    p.add_argument("--scope", choices=("block", "global"), default="block")
    p.add_argument("--data", type=Path, help="folder of pictures; rendered scenes if left out")
    p.add_argument("--batches", type=int, default=8, help="batches of pictures to look at")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--mean-context", action="store_true", help="fold removed means into biases")
    p.add_argument("--pretrained", action="store_true", help="download the weights of --model")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rounds", type=int, default=11, help="timing samples of each model")
    p.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    return p


def number(text: str) -> int | float:
    """An int, or a float if it is written with a point."""
    return float(text) if "." in text else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 2 for a request that cannot be met."""
    options = parser().parse_args(argv)
    try:
        run(options)
    except UsageError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """All steps, from the model to the folder."""
    check(options)
    torch.manual_seed(options.seed)
    with asked(OSError, ValueError, ImportError):
        model = load_model(options.model, pretrained=options.pretrained)
    if is_random(options.model, pretrained=options.pretrained):
        print("note: the weights are random; --pretrained or a folder brings trained ones")
    with asked(TypeError, ValueError):
        anatomy = anatomy_of("kdfast.prune", model)
        size = anatomy.adapter.image_size(model)
        check_model(anatomy, options)
    batches: list[Tensor] = []
    if reads_pictures(options):
        count = options.batches * options.batch_size
        with asked(OSError, ValueError, ImportError):
            batches.extend(
                image_batches(model, size, options.data, count=count, batch_size=options.batch_size)
            )
    print(f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"scoring heads by {options.method}, on {source(options)}")
    if options.method == "leave_one_out":
        print(effort(model, sum(len(site.held) for site in anatomy.attentions), batches))
    data = None if options.method == "magnitude" else batches
    scores = head_scores(model, options.method, data, seed=options.seed)
    kept, units = selected(model, scores, batches, options)
    mean: dict[str, Any] = {"mean_context": True, "data": batches} if options.mean_context else {}
    pruned = prune_heads(model, kept, mlp=units, **mean).eval()
    keep = [[len(row) for row in kept]]
    mlp_keep = None if units is None else [len(row) for row in units]
    report = pruning_report(model, keep, mlp_keep=mlp_keep)
    with asked(OSError, ValueError):
        save_pretrained(pruned, options.out)
        scores.save(options.out / "scores.json")
        draw_head_scores(scores, kept, options.out / "heads.png")
    image = batches[0][:1] if batches else noise(model, size)
    latency = latencies(model, pruned, image, options.rounds)
    with asked(OSError):
        write_report(options, report, kept, latency)
    show(report, latency, options)


def selected(
    model: nn.Module, scores: HeadScores, batches: list[Tensor], options: argparse.Namespace
) -> tuple[Selection, Selection | None]:
    """The heads to keep, and the hidden units where MLPs are to be pruned too."""
    with asked(ValueError):
        kept = select_heads(scores, options.keep, options.scope)
    if options.mlp_keep is None:
        return kept, None
    method = options.method if options.method in ("magnitude", "gradient") else "taylor"
    units = mlp_scores(model, method, None if method == "magnitude" else batches)
    with asked(ValueError):
        return kept, select_heads(units, options.mlp_keep, options.scope)


def check(options: argparse.Namespace) -> None:
    """Raises UsageError for a request that no model could meet."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"missing packages: {', '.join(missing)}; pip install 'kdfast[train]'")
    if (options.out / CONFIG).exists() and not options.overwrite:
        raise UsageError(f"--out: {options.out} holds a model already; --overwrite replaces it")
    if options.batches < 1 or options.batch_size < 1 or options.rounds < 2:
        raise UsageError("--batches and --batch-size must be at least 1, --rounds at least 2")
    for name in ("keep", "mlp_keep"):
        value = getattr(options, name)
        if isinstance(value, float) and not 0 < value <= 1:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}: with a point it is a fraction in (0, 1], got {value}")
    if options.data and not options.data.is_dir():
        raise UsageError(f"--data: must be a folder, got {options.data}")
    check_writable(options.out)


def check_model(anatomy: Anatomy, options: argparse.Namespace) -> None:
    """Raises UsageError for a request that this model cannot meet."""
    mlps = anatomy.mlps
    if options.mlp_keep is not None and not mlps:
        raise UsageError(f"--mlp-keep: no MLP of {options.model} can be pruned")
    sites = [*anatomy.attentions, *(mlps if options.mlp_keep is not None else [])]
    bare = [site.name for site in sites if getattr(site.projection, "bias", None) is None]
    if options.mean_context and bare:
        raise UsageError(f"--mean-context: needs a bias in the projections of {', '.join(bare)}")


def check_writable(out: Path) -> None:
    """Raises UsageError before the scoring if the folder could not be made after it."""
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written: {error.strerror}") from error


def reads_pictures(options: argparse.Namespace) -> bool:
    """Whether the request needs pictures; times can be measured on noise."""
    return options.method != "magnitude" or options.mean_context


def source(options: argparse.Namespace) -> str:
    """What the scores are measured on, in words."""
    if options.method == "magnitude":
        return "the weights alone"
    count = f"up to {options.batches * options.batch_size}"
    if options.data:
        return f"{count} pictures of {options.data}"
    return f"{count} rendered driving scenes; --data takes pictures of your own"


def effort(model: nn.Module, heads: int, batches: Sequence[Tensor]) -> str:
    """How long leave-one-out will take, and what takes less, in words."""
    seconds = leave_one_out_seconds(model, heads, batches)
    span = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    images = sum(map(len, batches))
    return (
        f"{heads} heads, each left out in half a pass over {images} "
        f"picture{'s' * (images > 1)}: about {span}; "
        "fewer --batches take less; --method taylor takes one pass forth and back in all"
    )


def write_report(
    options: argparse.Namespace,
    report: PruningReport,
    kept: list[list[int]],
    latency: dict[str, Latency],
) -> None:
    """``report.json``: request, kept heads, counts and times."""
    content = {
        "request": {name: str(value) for name, value in vars(options).items()},
        "kept": kept,
        "latency_ms": {name: row._asdict() for name, row in latency.items()},
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "family": processor().name,
        "date": time.strftime("%Y-%m-%d"),
        "cost": json.loads(report.to_json()),
    }
    (options.out / "report.json").write_text(json.dumps(content, indent=1) + "\n")


def show(report: PruningReport, latency: dict[str, Latency], options: argparse.Namespace) -> None:
    """The table and the paths."""
    from rich.console import Console
    from rich.table import Table

    before, after = report.full, report.pruned[0]
    table = Table(title=f"{options.model}, one {'x'.join(map(str, report.image_size))} image")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, old: float, new: float, form: str) -> None:
        ratio = f"{old / new:.2f}x" if new else ""
        table.add_row(name, format(old, form), format(new, form), ratio)

    row("heads", before.heads, after.heads, ",")
    row("parameters", before.params, after.params, ",")
    row("GMAC", before.flops / 2e9, after.flops / 2e9, ".3f")
    pruned = latency["pruned, fused"]
    for name, value in latency.items():
        if value is not pruned:
            row(f"ms, {name}", value.ms, pruned.ms, ".2f")
    console = Console()
    console.print(table)
    spread = max(value.iqr / value.ms for value in latency.values())
    console.print(
        f"times: medians of {options.rounds} alternating rounds on {cpu_name()}, "
        f"{processor().name}, {torch.get_num_threads()} threads; quartiles within {spread:.0%}",
        highlight=False,
    )
    for name in ("model.safetensors", CONFIG, "scores.json", "heads.png", "report.json"):
        print(options.out / name)


if __name__ == "__main__":
    sys.exit(main())
