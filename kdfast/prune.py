# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.prune``: score, prune, save and time a ViT without writing code.

See docs/use/pruning.md.
"""

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.machine.facts import cpu_name
from kdfast.machine.files import clear_partials, replacing_files, write_text
from kdfast.machine.signals import run_command
from kdfast.ops._processor import processor
from kdfast.pruning import (
    Calibration,
    HeadScores,
    calibrate,
    head_scores,
    mlp_scores,
    pruning_report,
    select_heads,
)
from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.block_times import latency_table
from kdfast.pruning.by_latency import Losses, check_goal, losses_of, selected
from kdfast.pruning.card import CARD, is_foreign
from kdfast.pruning.compensate import SiteError
from kdfast.pruning.constant import DropReport, drop_blocks
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.folder import CONFIG
from kdfast.pruning.heat_map import draw_head_scores
from kdfast.pruning.latency import Latency, latencies, leave_one_out_seconds
from kdfast.pruning.latency_goal import Goal, Outcome, corrected, remarks, tried
from kdfast.pruning.report import PruningReport
from kdfast.pruning.saving import save_pretrained
from kdfast.pruning.scores import METHODS, MLP_METHODS
from kdfast.pruning.surgery import prune_heads
from kdfast.pruning.tables import costs, outcome, site_errors
from kdfast.sources import MODEL_HELP, image_batches, is_random, load_model, noise

PACKAGES = ("matplotlib", "rich")  # for the heat map and the table
DTYPES = ("float32", "bfloat16", "float16")
# What --speedup and --latency-ms choose by themselves, and what stands for it without them.
DEFAULTS = {"keep": 0.5, "mlp_keep": None, "method": "taylor", "scope": "block"}
Selection = list[list[int]]  # positions that are kept, per block


class Chosen(NamedTuple):
    """What stays of a model.

    Attributes:
        scores: Of its heads, for the files.
        heads: Positions that are kept.
        units: The same of hidden units, where MLPs are pruned.
        outcome: Predicted and measured time, where a latency was asked for.
    """

    scores: HeadScores
    heads: Selection
    units: Selection | None
    outcome: Outcome | None = None


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
    p.add_argument("--keep", type=number, help="0.5, if left out: fraction; 6: heads per block")
    p.add_argument("--mlp-keep", type=number, help="the same for hidden units; all if left out")
    p.add_argument("--method", choices=METHODS, help="score of a head; taylor if left out")
    p.add_argument("--scope", choices=("block", "global"), help="block if left out")
    p.add_argument("--speedup", type=float, help="choose what makes it so many times faster here")
    p.add_argument("--latency-ms", type=float, help="or what makes it take so many milliseconds")
    p.add_argument("--latency-batch", type=int, default=1, help="images of a call, for these two")
    p.add_argument("--latency-dtype", choices=DTYPES, help="type that runs then; the model's own")
    cache = p.add_mutually_exclusive_group()
    cache.add_argument("--cache", type=Path, help="folder of measured latencies")
    cache.add_argument("--no-cache", action="store_true", help="measure them again, keep nothing")
    p.add_argument("--data", type=Path, help="folder of pictures; rendered scenes if left out")
    p.add_argument("--batches", type=int, default=8, help="batches of pictures to look at")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        help="fold what is removed into what stays; on where --data is given",
    )
    p.add_argument("--calibrate", type=int, default=200, help="pictures for --compensate, at most")
    p.add_argument("--sequential", action="store_true", help="a slower and better --compensate")
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
    return run_command(lambda: guarded(options), f"{options.out} holds no new model")


def guarded(options: argparse.Namespace) -> int:
    """The command after its command line: a request that cannot be met is one line."""
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
        batches = read(model, size, options.batches * options.batch_size, options)
    print(f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    pictures = read(model, size, options.calibrate, options) if compensates(options) else []
    calibration = calibrated(model, pictures, options)
    images = (batches or pictures or [noise(model, size)])[0][:1]
    if by_latency(options) and calibration is not None:
        chosen, images = for_latency(anatomy, calibration, images, options)
    else:
        chosen = for_scores(anatomy, batches, calibration, options)
    pruned, errors = cut(model, chosen, batches, pictures, calibration, options)
    dropped = drop_blocks(pruned) if chosen.outcome else DropReport([], {})
    params = sum(p.numel() for p in pruned.parameters())
    keep = [[len(row) for row in chosen.heads]]
    mlp_keep = None if chosen.units is None else [len(row) for row in chosen.units]
    report = pruning_report(model, keep, mlp_keep=mlp_keep)
    latency = latencies(as_type(model, images), as_type(pruned, images), images, options.rounds)
    if chosen.outcome is not None:
        dense = latency.get("before, fused", latency["before"])
        found = replace(chosen.outcome, dense=dense, pruned=latency["pruned, fused"])
        chosen = chosen._replace(outcome=found)
    with asked(OSError, ValueError):
        options.out.mkdir(parents=True, exist_ok=True)
        clear_partials(options.out)
        with replacing_files(options.out, last=CONFIG) as folder:
            times = {f"ms, {name}": value.ms for name, value in latency.items()}
            save_pretrained(pruned, folder, metrics=times)
            if is_foreign(options.out / CARD):
                (folder / CARD).unlink()
            chosen.scores.save(folder / "scores.json")
            draw_head_scores(chosen.scores, chosen.heads, folder / "heads.png")
            write_report(folder, options, report, chosen, latency, errors, dropped)
    show(report, latency, chosen, errors, dropped, params, images, options)


def by_latency(options: argparse.Namespace) -> bool:
    """Whether a latency was asked for."""
    return options.speedup is not None or options.latency_ms is not None


def read(
    model: nn.Module, size: tuple[int, int], count: int, options: argparse.Namespace
) -> list[Tensor]:
    """Batches of pictures."""
    with asked(OSError, ValueError, ImportError):
        return list(
            image_batches(model, size, options.data, count=count, batch_size=options.batch_size)
        )


def as_type(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in the type of the images, a copy where it has another."""
    if next(model.parameters()).dtype == images.dtype:
        return model
    return copy.deepcopy(model).to(images.dtype)


def for_scores(
    anatomy: Anatomy,
    batches: list[Tensor],
    calibration: Calibration | None,
    options: argparse.Namespace,
) -> Chosen:
    """What --keep and --mlp-keep leave, by the scores."""
    model = anatomy.model
    print(f"scoring heads by {options.method}, on {source(options)}")
    if options.method == "leave_one_out":
        print(effort(model, sum(len(site.held) for site in anatomy.attentions), batches))
    scores = head_scores(
        model, options.method, data_of(options.method, batches, calibration), seed=options.seed
    )
    return Chosen(scores, *by_scores(model, scores, batches, calibration, options))


def for_latency(
    anatomy: Anatomy, calibration: Calibration, images: Tensor, options: argparse.Namespace
) -> tuple[Chosen, Tensor]:
    """What --speedup or --latency-ms leave, and the images that the times are of."""
    model, batch = anatomy.model, options.latency_batch
    dtype = getattr(torch, options.latency_dtype) if options.latency_dtype else images.dtype
    images = images.expand(batch, *images.shape[1:]).contiguous().to(dtype)
    place: Path | bool = options.cache or not options.no_cache
    goal = Goal(options.speedup, options.latency_ms)
    size = (images.shape[2], images.shape[3])
    table = latency_table(model, batch=batch, dtype=dtype, image_size=size, cache=place)
    print(f"latencies of blocks: {table.origin.text}")
    losses = losses_of(anatomy, calibration, progress=True)
    with asked(ValueError):
        selection = selected(anatomy, losses, table, goal.ms(table.dense_ms))
    result = tried(model, selection, images, options.rounds)
    print(f"first try: {result.pruned.ms:.2f} ms, predicted {result.predicted_ms:.2f} ms")
    if result.misses(goal):
        result = again(anatomy, losses, result, goal)
    scores = head_scores(model, "reconstruction", calibration)
    return Chosen(scores, result.selection.heads, result.selection.mlp, result), images


def again(anatomy: Anatomy, losses: Losses, first: Outcome, goal: Goal) -> Outcome:
    """The selection for predictions as far off as the first was, or the first if there is none."""
    missed = f"it misses {goal}, by more than times may be off ({first.spread:.1%})"
    try:
        result = corrected(anatomy, losses, first, goal)
    except ValueError as error:
        print(f"{missed}, and nothing can be done about it: {error}")
        return first
    print(f"{missed}: chosen again, with predictions times {result.factor:.3f}")
    return result


def compensates(options: argparse.Namespace) -> bool:
    """Whether removed parts are folded into kept ones: by default where there is data for it."""
    if options.compensate is None:
        return options.data is not None and not options.mean_context
    return bool(options.compensate)


def calibrated(
    model: nn.Module, pictures: Sequence[Tensor], options: argparse.Namespace
) -> Calibration | None:
    """The moments for the compensation, with a word about it."""
    if not pictures:
        return None
    origin = options.data or "rendered driving scenes"
    how = ", one site after the other" if options.sequential else ""
    why = "" if options.compensate or by_latency(options) else " (--no-compensate turns it off)"
    print(f"compensating on {sum(map(len, pictures))} pictures of {origin}{how}{why}")
    return calibrate(model, pictures)


def data_of(method: str, batches: list[Tensor], calibration: Calibration | None) -> Any:
    """What a score of this method reads."""
    if method == "magnitude":
        return None
    return calibration if method == "reconstruction" and calibration is not None else batches


def cut(
    model: nn.Module,
    chosen: Chosen,
    batches: list[Tensor],
    pictures: list[Tensor],
    calibration: Calibration | None,
    options: argparse.Namespace,
) -> tuple[nn.Module, list[SiteError]]:
    """The pruned model, and the errors of its sites where it was compensated."""
    more: dict[str, Any] = {}
    if calibration is not None:
        more = {"compensate": calibration, "sequential": options.sequential, "data": pictures}
    elif options.mean_context:
        more = {"mean_context": True, "data": batches}
    errors: list[SiteError] = []
    pruned = prune_heads(model, chosen.heads, mlp=chosen.units, errors=errors, **more)
    return pruned.eval(), errors


def by_scores(
    model: nn.Module,
    scores: HeadScores,
    batches: list[Tensor],
    calibration: Calibration | None,
    options: argparse.Namespace,
) -> tuple[Selection, Selection | None]:
    """The heads to keep, and the hidden units where MLPs are to be pruned too."""
    with asked(ValueError):
        kept = select_heads(scores, options.keep, options.scope)
    if options.mlp_keep is None:
        return kept, None
    method = options.method if options.method in MLP_METHODS else "taylor"
    units = mlp_scores(model, method, data_of(method, batches, calibration))
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
    check_latency(options)
    if options.compensate and options.mean_context:
        raise UsageError("--mean-context: --compensate has it, give one of them")
    if options.sequential and not compensates(options):
        raise UsageError("--sequential: needs --compensate or --data")
    if options.calibrate < 1:
        raise UsageError(f"--calibrate: must be at least 1, got {options.calibrate}")
    for name in ("keep", "mlp_keep"):
        value = getattr(options, name)
        if isinstance(value, float) and not 0 < value <= 1:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}: with a point it is a fraction in (0, 1], got {value}")
    if options.data and not options.data.is_dir():
        raise UsageError(f"--data: must be a folder, got {options.data}")
    check_writable(options.out)


def check_latency(options: argparse.Namespace) -> None:
    """Raises UsageError for a goal in time that is none, and fills in what is not chosen by one."""
    if not by_latency(options):
        for name, value in DEFAULTS.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        return
    with asked(ImportError, ValueError):
        check_goal(options.speedup, options.latency_ms)
    given = [name for name in DEFAULTS if getattr(options, name) is not None]
    if given:
        flag = given[0].replace("_", "-")
        raise UsageError(f"--{flag}: a latency chooses heads and hidden units, leave it out")
    if options.compensate is False or options.mean_context:
        raise UsageError("--speedup and --latency-ms count on --compensate, leave it on")
    if not compensates(options):
        raise UsageError("--speedup and --latency-ms need --data FOLDER, or --compensate")
    if options.latency_batch < 1:
        raise UsageError(f"--latency-batch: must be at least 1, got {options.latency_batch}")
    options.method = "reconstruction"


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
    """Whether the scores or mean contexts need pictures; times can be measured on noise."""
    if options.method == "reconstruction" and compensates(options):
        return False
    return options.method != "magnitude" or options.mean_context


def source(options: argparse.Namespace) -> str:
    """What the scores are measured on, in words."""
    if options.method == "magnitude":
        return "the weights alone"
    if options.method == "reconstruction" and compensates(options):
        return "the same pictures"
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
    folder: Path,
    options: argparse.Namespace,
    report: PruningReport,
    chosen: Chosen,
    latency: dict[str, Latency],
    errors: list[SiteError],
    dropped: DropReport,
) -> None:
    """``report.json``: request, kept heads, errors of the sites, counts and times."""
    content = {
        "request": {name: str(value) for name, value in vars(options).items()},
        "kept": chosen.heads,
        "units": None if chosen.units is None else [len(row) for row in chosen.units],
        "dropped": dropped.dropped,
        "errors": [error._asdict() for error in errors],
        "latency_ms": {name: row._asdict() for name, row in latency.items()},
        "goal": None if chosen.outcome is None else chosen.outcome.facts(),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "family": processor().name,
        "date": time.strftime("%Y-%m-%d"),
        "cost": json.loads(report.to_json()),
    }
    write_text(folder / "report.json", json.dumps(content, indent=1) + "\n")


def show(
    report: PruningReport,
    latency: dict[str, Latency],
    chosen: Chosen,
    errors: Sequence[SiteError],
    dropped: DropReport,
    params: int,
    images: Tensor,
    options: argparse.Namespace,
) -> None:
    """The tables and the paths."""
    from rich.console import Console

    console = Console()
    if errors:
        console.print(site_errors(errors))
    side = "x".join(map(str, report.image_size))
    kind = str(images.dtype).removeprefix("torch.")
    what = f"one {side} image" if len(images) == 1 else f"{len(images)} {side} images"
    what = what if kind == "float32" else f"{what} in {kind}"
    console.print(costs(report, latency, options.model, params, what))
    spread = max(value.iqr / value.ms for value in latency.values())
    console.print(
        f"times: medians of {options.rounds} alternating rounds on {cpu_name()}, "
        f"{processor().name}, {torch.get_num_threads()} threads; quartiles within {spread:.0%}",
        highlight=False,
    )
    if chosen.outcome is not None:
        console.print(outcome(chosen.outcome))
        goal = Goal(options.speedup, options.latency_ms)
        for line in remarks(chosen.outcome, goal, dropped):
            console.print(line, highlight=False)
    for name in ("model.safetensors", CONFIG, "scores.json", "heads.png", "report.json"):
        print(options.out / name)


if __name__ == "__main__":
    sys.exit(main())
