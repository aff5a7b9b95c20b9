# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.plan``: what a training needs of a GPU, the batch that fits, and the hours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from kdfast.chain.planning import chain_steps
from kdfast.commandline.plan import parser
from kdfast.configs import ChainConfig, Config, ConfigError, load
from kdfast.machine.gpus import Gpus
from kdfast.machine.signals import run_command
from kdfast.memory.measure import GIB, MemoryPlan, Step, checkpointed, mib, supervised
from kdfast.memory.search import DoesNotFit, largest
from kdfast.memory.steps import PRECISION, PlannedStep
from kdfast.recovery.planning import recovery_step
from kdfast.sources import check_model_name, load_model, picture_size

# Shares of a data sheet's rate between which trainings of transformers lie.
REACHED = (0.25, 0.5)
CANDIDATES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
# Options that say what a config says otherwise, and what they are where --model has none.
OF_MODEL: dict[str, Any] = {
    "teacher": None,
    "size": None,
    "batch": 8,
    "precision": "bf16",
    "optimizer": "adamw",
    "checkpointing": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plans.

    Returns:
        0; 1 if a stage does not fit into ``--vram``; 2 if the command line cannot be used.
    """
    args = parser().parse_args(argv)
    return run_command(lambda: guarded(args), "no plan was made")


def guarded(args: argparse.Namespace) -> int:
    """The command after its command line: what cannot be used is one line."""
    unusable = _unusable(args)
    if unusable is not None:
        print(f"error: {unusable}", file=sys.stderr)
        return 2
    for name, value in OF_MODEL.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        if args.config is None:
            steps = [_model_step(args)]
        else:
            steps = steps_of(load(args.config, args.changes, files=False), args.classes)
        if args.shard is not None:
            steps = [replace(step, shard=args.shard) for step in steps]
        if args.gpu is not None and args.vram is None:
            args.vram = args.gpu.each.gib * GIB
        fits = [_report(step, args, args.processes or 1) for step in steps]
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(fits) else 1


def _unusable(args: argparse.Namespace) -> str | None:
    """Why options do not go together, or None."""
    if (args.config is None) == (args.model is None):
        return "give either --config or --model"
    given = [f"--{name}" for name in OF_MODEL if getattr(args, name) is not None]
    if args.config is not None and given:
        return f"{', '.join(given)} cannot be said of a config; change its keys by --set"
    if args.model is not None and args.changes:
        return "--set changes a config, and --model has none"
    if args.images is not None and args.gpu is None:
        return "--images is for the hours, which need --gpu"
    if args.images is not None and args.images < 1:
        return f"--images must be at least 1, got {args.images}"
    if args.processes is not None and args.processes < 1:
        return f"--processes must be at least 1, got {args.processes}"
    if args.shard == "fsdp" and (args.processes or 1) == 1:
        return "--shard fsdp divides models among --processes, which must be 2 or more"
    if args.classes < 1:
        return f"--classes must be at least 1, got {args.classes}"
    return None


def steps_of(config: Config | ChainConfig, classes: int = 10) -> list[PlannedStep]:
    """The training steps of a config in their order.

    Args:
        config: Its files need not exist: an ORION checkpoint is taken to be EVA-L.
        classes: Number of classes of a chain's data, which only the data knows.
    """
    if isinstance(config, ChainConfig):
        return chain_steps(config, classes)
    return [recovery_step(config)]


def _model_step(args: argparse.Namespace) -> PlannedStep:
    for flag, name in (("--model", args.model), ("--teacher", args.teacher)):
        if name is not None:
            check_model_name(name, flag)

    def model(name: str) -> Callable[[], nn.Module]:
        extra = {} if args.size is None else {"img_size": args.size}
        return lambda: load_model(name, classes=args.classes, **extra)

    def build(recompute: bool) -> Step:
        teacher = None if args.teacher is None else model(args.teacher)()
        student = model(args.model)()
        student = checkpointed(student, True) if recompute else student
        return supervised(student, teacher, args.optimizer)

    with torch.device("meta"):
        own = picture_size(model(args.model)())
    size = own if args.size is None else (args.size, args.size)
    return PlannedStep(
        args.model + (f" taught by {args.teacher}" if args.teacher else ""),
        build,
        args.batch,
        size,
        PRECISION[args.precision],
        args.checkpointing,
    )


def _report(step: PlannedStep, args: argparse.Namespace, processes: int) -> bool:
    """Print the plan of a step; whether it fits."""
    plan_of = partial(step.plan, processes=processes)
    vram: int | None = args.vram
    print(f"\n{step.title}")
    if step.shard != "none" and processes == 1:
        print(f"  shard {step.shard}: --processes says how many hold a part; this is one alone")
    plan = None
    if step.batch is not None:
        _say(f"measuring a step with batch {step.batch} ...")
        plan = plan_of(step.batch, step.checkpointing)
        print(_text(plan, args.modules))
    if step.before is not None:
        print(f"  before it, {step.before.title} keeps {mib(step.before.bytes)}")
    if vram is None:
        return True
    small = step.before is None or step.before.bytes <= vram
    if step.before is not None and not small:
        print(f"  {step.before.title} DOES NOT FIT into {vram / GIB:.1f} GiB: {step.before.fix}")
    fits = plan is not None and plan.peak_bytes <= vram
    if plan is not None:
        rest = vram - plan.peak_bytes
        print(
            f"  {'fits' if fits else 'DOES NOT FIT'} into {vram / GIB:.1f} GiB: "
            f"{mib(abs(rest))} {'to spare' if fits else 'too much'}"
        )
    _say("searching the largest batch ...")
    try:
        best = largest(plan_of, vram, CANDIDATES, checkpointing=step.checkpointing)
    except DoesNotFit as error:
        print(f"  {error}")
        return False
    recompute = " with checkpointing" if best.checkpointing else ""
    more = " or more" if best.batch == CANDIDATES[-1] else ""
    print(
        f"  largest batch in {vram / GIB:.1f} GiB: {best.batch}{more}{recompute}, "
        f"{mib(best.peak_bytes)}"
    )
    if args.gpu is not None:
        planned = plan if fits and plan is not None else plan_of(best.batch, best.checkpointing)
        print(_hours(step, planned, args.gpu, args.images))
    return small and (fits or step.batch is None)


def _say(text: str) -> None:
    """What takes its time now; not on the standard output, which holds the result."""
    print(f"  {text}", file=sys.stderr, flush=True)


def _hours(step: PlannedStep, plan: MemoryPlan, gpus: Gpus, images: int | None) -> str:
    """How long all epochs take, by the operations of a step and a data sheet."""
    images = images or step.images
    each = plan.flops / plan.batch
    work = f"{each / 1e12:.3g} TFLOP" if each >= 1e11 else f"{each / 1e9:.3g} GFLOP"
    work = f"  {work} an image"
    if images is None:
        return f"{work}; --images says how many an epoch has, for the hours"
    rate = gpus.each.single if step.amp is None else gpus.each.half
    seconds = images * step.epochs * each / (gpus.count * rate * 1e12)
    unit, name = (3600, "hours") if seconds > 1800 else (60, "minutes")
    slow, fast = (seconds / share / unit for share in REACHED)
    epochs = f", {step.epochs} epochs" if step.epochs > 1 else ""
    return (
        f"{work}, {images:,} images{epochs}: {fast:.2g} to {slow:.2g} {name} on {gpus}\n"
        f"  (if {REACHED[0]:.0%} to {REACHED[1]:.0%} of {rate:g} TFLOP/s each is reached: "
        "an estimate, nothing was run)"
    )


def _text(plan: MemoryPlan, modules: bool) -> str:
    return str(plan) if modules else str(plan).split("\n\n")[0]


if __name__ == "__main__":
    sys.exit(main())
