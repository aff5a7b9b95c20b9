# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.prune``: score, prune, save and time a ViT without writing code.

See docs/use/pruning.md.
"""

import argparse
import copy
import difflib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.machine.facts import cpu_name
from kdfast.machine.timing import interleave, summarize
from kdfast.nn import accelerate
from kdfast.pruning import (
    head_scores,
    mlp_scores,
    prune_heads,
    pruning_report,
    select_heads,
)
from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.heat_map import draw_heads
from kdfast.pruning.report import PruningReport
from kdfast.pruning.saving import CONFIG, load_pretrained, save_pretrained
from kdfast.pruning.scores import METHODS

PACKAGES = ("matplotlib", "rich")  # for the heat map and the table
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class UsageError(Exception):
    """Something in the request that the user has to change; the message is one line."""


@contextmanager
def asked(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds inside mean a request that cannot be met.

    Only around what runs no code of the model: an error of that keeps its traceback.
    """
    try:
        yield
    except kinds as error:
        raise UsageError(str(error)) from error


class Latency(NamedTuple):
    """Median milliseconds of one forward pass, and the quartiles' distance."""

    ms: float
    iqr: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m kdfast.prune",
        description="Prunes the attention heads (and MLPs) of a ViT, saves it and times it.",
    )
    p.add_argument("--model", required=True, help="name of timm, or folder of a saved model")
    p.add_argument("--out", required=True, type=Path, help="folder to write")
    p.add_argument("--keep", type=number, default=0.5, help="0.5: fraction; 6: heads per block")
    p.add_argument("--mlp-keep", type=number, help="the same for hidden units; all if left out")
    p.add_argument("--method", choices=METHODS, default="taylor", help="score of a head")
    p.add_argument("--scope", choices=("block", "global"), default="block")
    p.add_argument("--data", type=Path, help="folder of pictures; rendered scenes if left out")
    p.add_argument("--batches", type=int, default=8, help="batches of pictures to look at")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--mean-context", action="store_true", help="fold removed means into biases")
    p.add_argument("--pretrained", action="store_true", help="timm's weights, from the network")
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
        model = load(options.model, options.pretrained)
    with asked(TypeError, ValueError):
        anatomy = anatomy_of("kdfast.prune", model)
        size = anatomy.adapter.image_size(model)
        check_model(anatomy, options)
    with asked(OSError, ValueError, ImportError):
        batches = list(pictures(model, size, options))
    print(f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"scoring heads by {options.method}, on {source(options)}")
    data = None if options.method == "magnitude" else batches
    if options.method == "leave_one_out":
        print(effort(model, sum(len(site.held) for site in anatomy.attentions), batches))
    scores = head_scores(model, options.method, data, seed=options.seed)
    with asked(ValueError):
        kept = select_heads(scores, options.keep, options.scope)
    units = None
    if options.mlp_keep is not None:
        method = options.method if options.method in ("magnitude", "gradient") else "taylor"
        looked = mlp_scores(model, method, None if method == "magnitude" else batches)
        with asked(ValueError):
            units = select_heads(looked, options.mlp_keep, options.scope)
    mean: dict[str, Any] = {"mean_context": True, "data": batches} if options.mean_context else {}
    pruned = prune_heads(model, kept, mlp=units, **mean).eval()
    keep = [[len(row) for row in kept]]
    mlp_keep = None if units is None else [len(row) for row in units]
    report = pruning_report(model, keep, mlp_keep=mlp_keep)
    with asked(OSError, ValueError):
        save_pretrained(pruned, options.out)
        scores.save(options.out / "scores.json")
        draw_heads(scores, kept, options.out / "heads.png")
    image = batches[0][:1] if batches else noise(model, size)
    latency = timed(model, pruned, image, options.rounds)
    with asked(OSError):
        write_report(options, report, kept, latency)
    show(report, latency, options)


def check(options: argparse.Namespace) -> None:
    """Raises UsageError for what is wrong whatever the model is."""
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
    """Raises UsageError for what this model does not have."""
    mlps = anatomy.mlps
    if options.mlp_keep is not None and not mlps:
        raise UsageError(f"--mlp-keep: no MLP of {options.model} can be pruned")
    sites = [*anatomy.attentions, *(mlps if options.mlp_keep is not None else [])]
    bare = [site.name for site in sites if getattr(site.projection, "bias", None) is None]
    if options.mean_context and bare:
        raise UsageError(f"--mean-context: needs a bias in the projections of {', '.join(bare)}")


def check_writable(out: Path) -> None:
    """Raises UsageError now, instead of after the scoring, where the folder cannot be made."""
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written: {error.strerror}") from error


def load(name: str, pretrained: bool) -> nn.Module:
    """A model of a folder or of timm, in eval mode.

    Raises:
        UsageError: There is no such folder or name.
    """
    if Path(name).is_dir():
        if pretrained:
            raise UsageError(f"--pretrained: belongs to names of timm; {name} is a folder")
        folder_model: nn.Module = load_pretrained(name)
        return folder_model
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"--model: {name} is neither a folder nor a model of timm{hint}")
    if not pretrained:
        print("note: the weights are random; --pretrained or a folder brings trained ones")
    model: nn.Module = timm.create_model(name, pretrained=pretrained).eval()
    return model


def reads_pictures(options: argparse.Namespace) -> bool:
    """Whether anything but a time depends on pictures."""
    return options.method != "magnitude" or options.mean_context


def source(options: argparse.Namespace) -> str:
    """What the scores are measured on, in words."""
    if options.method == "magnitude":
        return "the weights alone"
    count = f"up to {options.batches * options.batch_size}"
    if options.data:
        return f"{count} pictures of {options.data}"
    return f"{count} rendered driving scenes; --data takes pictures of your own"


@torch.no_grad()
def effort(model: nn.Module, heads: int, batches: Sequence[Tensor]) -> str:
    """How long leave-one-out will take, from one pass: half of one for every head and batch."""
    model(batches[0][:1])
    start = time.perf_counter()
    model(batches[0])
    seconds = (time.perf_counter() - start) * len(batches) * (1 + heads / 2)
    span = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    images = sum(map(len, batches))
    return (
        f"{heads} heads, each left out in half a pass over {images} "
        f"picture{'s' * (images > 1)}: about {span}; "
        "fewer --batches take less; --method taylor takes one pass forth and back in all"
    )


def pictures(
    model: nn.Module, size: tuple[int, int], options: argparse.Namespace
) -> Iterator[Tensor]:
    """Batches (B, 3, H, W), normalised as the model was trained; none if there is no need."""
    if not reads_pictures(options):
        return
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (
        torch.tensor(config.get(name, default)).view(3, 1, 1)
        for name, default in zip(("mean", "std"), IMAGENET, strict=True)
    )
    dtype = next(model.parameters()).dtype
    count = options.batches * options.batch_size
    images = folder(options.data, size, count) if options.data else scenes(size, count)
    some: list[Tensor] = []
    for image in images:
        some.append(((image - mean) / std).to(dtype))
        if len(some) == options.batch_size:
            yield torch.stack(some)
            some = []
    if some:
        yield torch.stack(some)


def folder(root: Path, size: tuple[int, int], count: int) -> Iterator[Tensor]:
    """Pictures (3, H, W) in [0, 1], spread over the folder; resized and cropped in the middle."""
    import numpy
    from PIL import Image, ImageOps

    from kdfast.data.files import SUFFIXES, list_images

    names = list_images(root)
    if not names:
        raise UsageError(f"--data: {root} must hold pictures ({', '.join(SUFFIXES)}), got none")
    step = max(1, len(names) // count)
    for name in names[::step][:count]:
        try:
            with Image.open(root / name) as file:
                image = ImageOps.fit(file.convert("RGB"), (size[1], size[0]))
        except OSError as error:
            raise UsageError(f"--data: {root / name} cannot be read: {error}") from error
        yield torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255


def scenes(size: tuple[int, int], count: int) -> Iterator[Tensor]:
    """Rendered pictures (3, H, W) in [0, 1]."""
    from kdfast.data import MEAN, STD, build

    height, width = (side + side % 2 for side in size)
    dataset = build(kind="scenes", size=(height, width), frames=-(-count // 6))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    for index in range(count):
        image: Any = dataset[index]
        yield ((image["image"] * std + mean) / 255)[:, : size[0], : size[1]]


def noise(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """One image (1, 3, H, W), as good as any for a time."""
    return torch.randn(1, 3, *size).to(next(model.parameters()).dtype)


@torch.no_grad()
def timed(model: nn.Module, pruned: nn.Module, image: Tensor, rounds: int) -> dict[str, Latency]:
    """Forward passes of one image, in alternating rounds."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    fused = copy.deepcopy(model, memo)  # on the same tensors
    candidates = {"before": model, "before, fused": fused, "pruned, fused": pruned}
    if not accelerate(fused).replaced:
        del candidates["before, fused"]
    accelerate(pruned)
    calls = {name: (lambda m=m: m(image)) for name, m in candidates.items()}
    samples = {name: summarize(rows) for name, rows in interleave(calls, rounds=rounds).items()}
    return {name: Latency(row["ms"], row["iqr"]) for name, row in samples.items()}


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
        f"{torch.get_num_threads()} threads; quartiles within {spread:.0%}",
        highlight=False,
    )
    for name in ("model.safetensors", CONFIG, "scores.json", "heads.png", "report.json"):
        print(options.out / name)


if __name__ == "__main__":
    sys.exit(main())
