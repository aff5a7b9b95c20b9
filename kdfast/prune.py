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
from kdfast.pruning.compensate import SiteError
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.folder import CONFIG
from kdfast.pruning.heat_map import draw_head_scores
from kdfast.pruning.latency import Latency, latencies, leave_one_out_seconds
from kdfast.pruning.report import PruningReport
from kdfast.pruning.saving import save_pretrained
from kdfast.pruning.scores import METHODS, MLP_METHODS
from kdfast.pruning.surgery import prune_with_errors
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
        count = options.batches * options.batch_size
        with asked(OSError, ValueError, ImportError):
            batches.extend(
                image_batches(model, size, options.data, count=count, batch_size=options.batch_size)
            )
    print(f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    pictures: list[Tensor] = []
    if compensates(options):
        with asked(OSError, ValueError, ImportError):
            pictures.extend(
                image_batches(
                    model,
                    size,
                    options.data,
                    count=options.calibrate,
                    batch_size=options.batch_size,
                )
            )
    calibration = calibrated(model, pictures, options)
    print(f"scoring heads by {options.method}, on {source(options)}")
    if options.method == "leave_one_out":
        print(effort(model, sum(len(site.held) for site in anatomy.attentions), batches))
    scores = head_scores(
        model, options.method, data_of(options.method, batches, calibration), seed=options.seed
    )
    kept, units = selected(model, scores, batches, calibration, options)
    pruned, errors = cut(model, kept, units, batches, pictures, calibration, options)
    keep = [[len(row) for row in kept]]
    mlp_keep = None if units is None else [len(row) for row in units]
    report = pruning_report(model, keep, mlp_keep=mlp_keep)
    images = batches or pictures
    image = images[0][:1] if images else noise(model, size)
    latency = latencies(model, pruned, image, options.rounds)
    with asked(OSError, ValueError):
        options.out.mkdir(parents=True, exist_ok=True)
        clear_partials(options.out)
        with replacing_files(options.out, last=CONFIG) as folder:
            save_pretrained(pruned, folder)
            scores.save(folder / "scores.json")
            draw_head_scores(scores, kept, folder / "heads.png")
            write_report(folder, options, report, kept, latency, errors)
    if errors:
        show_errors(errors)
    show(report, latency, options)


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
    why = "" if options.compensate else " (--no-compensate turns it off)"
    print(f"compensating on {sum(map(len, pictures))} pictures of {origin}{how}{why}")
    return calibrate(model, pictures)


def data_of(method: str, batches: list[Tensor], calibration: Calibration | None) -> Any:
    """What a score of this method reads."""
    if method == "magnitude":
        return None
    return calibration if method == "reconstruction" and calibration is not None else batches


def cut(
    model: nn.Module,
    kept: Selection,
    units: Selection | None,
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
    pruned, errors = prune_with_errors(model, kept, mlp=units, **more)
    return pruned.eval(), errors


def selected(
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
    kept: list[list[int]],
    latency: dict[str, Latency],
    errors: list[SiteError],
) -> None:
    """``report.json``: request, kept heads, errors of the sites, counts and times."""
    content = {
        "request": {name: str(value) for name, value in vars(options).items()},
        "kept": kept,
        "errors": [error._asdict() for error in errors],
        "latency_ms": {name: row._asdict() for name, row in latency.items()},
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "family": processor().name,
        "date": time.strftime("%Y-%m-%d"),
        "cost": json.loads(report.to_json()),
    }
    write_text(folder / "report.json", json.dumps(content, indent=1) + "\n")


def show_errors(errors: Sequence[SiteError]) -> None:
    """A table of what pruning does to the output of every site, without and with compensation."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="error of a site's output, as a share of its variance")
    for name in ("site", "kept", "cut", "compensated"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for name, kept, of, before, after in errors:
        table.add_row(name, f"{kept} of {of}", f"{before:.4f}", f"{after:.4f}")
    Console().print(table)


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
