# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.train --config NAME``: prune a teacher's heads and distil the loss away.

Teacher, head scores, pruned student, training, report; docs/use/training.md explains all of it.
Configs of chains go to ``kdfast.chain``; docs/use/vit_chain.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # OpenMP reads this when torch is loaded, and its default, spinning, makes a step ten times
    # slower as soon as another process wants one of the cores (docs/use/training.md).
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import save_file
from torch import Tensor, nn

from kdfast.configs import CONFIGS, ChainConfig, Config, ConfigError, load, plain, save
from kdfast.data.files import CorruptDataError
from kdfast.data.scenes import CLASSES, PALETTE
from kdfast.data.views.base import Corrupt, ViewDataset
from kdfast.models.checkpoint import save_backbone
from kdfast.models.eva import EVAViT
from kdfast.recovery.evaluate import Evaluator
from kdfast.recovery.objective import Distiller
from kdfast.recovery.parts import Data, build_data, build_student, choose_heads, score_heads
from kdfast.recovery.report import draw_predictions, measure, write_report
from kdfast.recovery.teacher import get_teacher
from kdfast.trainer.logs import LOG, close_log
from kdfast.trainer.loop import Job, Loop, NonFiniteLoss
from kdfast.trainer.runs import release_folder, run_folder, show_start
from kdfast.trainer.signals import Interrupted
from kdfast.trainer.state import load_checkpoint, newest

VIEWS = 4
# The main process may fill a teacher cache while the others wait; NCCL gives up after 10 minutes.
PATIENCE = timedelta(days=2)
# What a resumed run may change: it moves files or stops elsewhere, but computes the same.
FREE = {
    "": ("name", "output", "note"),
    "teacher": ("cache",),
    "data": ("workers", "cache"),
    "run": ("max_steps", "save_every", "log_every", "eval_images", "device"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a config.

    Args:
        argv: Command line without the program; that of the process if None.

    Returns:
        0; 1 if the training broke or a file could not be written; 2 if the config, the data or a
        checkpoint cannot be used; 128 plus the signal if it was interrupted and the state was
        saved.
    """
    parser = argparse.ArgumentParser(prog="python -m kdfast.train", description=__doc__)
    names = ", ".join(CONFIGS)
    parser.add_argument("--config", required=True, help=f"one of {names}, or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change a value of it"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the newest run of the config's output"
    )
    args = parser.parse_args(argv)
    try:
        status = run(load(args.config, args.set), resume=args.resume)
        if dist.is_initialized():
            dist.destroy_process_group()
        return status
    except Interrupted as stop:
        LOG.info("%s; the state is saved, go on with --resume", stop)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("error: interrupted outside of training, nothing to save", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ConfigError, CorruptDataError, NonFiniteLoss, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        close_log()
        release_folder()


def run(config: Config | ChainConfig, *, resume: bool = False) -> int:
    """Everything that ``main`` does after the command line; raises instead of printing."""
    if isinstance(config, ChainConfig):
        # Imported here: metrics take seconds to import, and pruning runs need none.
        from kdfast.chain.run import run_chain

        return run_chain(config, make_accelerator(config.precision, config.device), resume=resume)
    return run_pruning(config, make_accelerator(config.run.precision, config.run.device), resume)


def make_accelerator(precision: str, device: str) -> Accelerator:
    """Device and precision of a run, also where this process had others before."""
    if not dist.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    with as_config_error():
        return Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=device == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )


def run_pruning(config: Config, accelerator: Accelerator, resume: bool) -> int:
    """Prune a teacher's heads and distil: teacher, scores, student, training, report."""
    missing = "--resume: " if resume else None
    folder = run_folder(Path(config.output).expanduser(), accelerator, missing)
    words = [f"{accelerator.num_processes} x {accelerator.device}"]
    words += [f"precision {config.run.precision}", f"{torch.get_num_threads()} threads"]
    words += [f"data: {config.data.kind} {config.data.root or ''}".strip()]
    show_start(config, accelerator, folder, resume, ", ".join(words))
    with as_config_error():
        data = build_data(config, accelerator)
        torch.manual_seed(config.seed)
        teacher, head = get_teacher(config, accelerator, data, folder / "teacher", resume=resume)
    heads = kept_heads(config, accelerator, teacher, head, data, folder, resume)
    with as_config_error():
        student = build_student(config, teacher, heads)
        distiller = Distiller(student, teacher, head, config.distill).to(accelerator.device)
    evaluate = Evaluator(
        accelerator,
        data.held_out,
        head,
        teacher if head is None else None,
        config.run.eval_images,
    )
    quality = baseline(config, evaluate, teacher, heads, folder, resume)
    # Ranks draw different drop paths; the order and the masks come from the config's seed.
    torch.manual_seed(config.seed + accelerator.process_index)
    job = Job(
        title="distil",
        folder=folder,
        module=distiller,
        depth=len(student.blocks),
        feed=data.train,
        optim=config.optim,
        run=config.run,
        meta={"stage": "distil", "config": identity(config), "heads": heads},
        evaluate=lambda: {evaluate.name: evaluate(student)},
    )
    with as_config_error():
        loop = Loop(job, accelerator)
    loop.fit(resume=resume)
    if accelerator.is_main_process:
        save(config, folder / "config.yaml")
    accelerator.free_memory()
    quality["distilled"] = evaluate(student)
    if accelerator.is_main_process:
        models = {"teacher": teacher, "pruned": build_student(config, teacher, heads)}
        finish(config, accelerator, folder, {**models, "distilled": student}, head, quality, data)
    accelerator.wait_for_everyone()
    return 0


@contextmanager
def as_config_error() -> Iterator[None]:
    """Turns the complaints about files and values that a config names into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError([str(error)]) from error


def kept_heads(
    config: Config,
    accelerator: Accelerator,
    teacher: EVAViT,
    head: nn.Module | None,
    data: Data,
    folder: Path,
    resume: bool,
) -> list[list[int]]:
    """The student's heads: those of the run that is resumed, else chosen by score."""
    path = newest(folder) if resume else None
    if path is not None:
        with as_config_error():
            heads: list[list[int]] = load_checkpoint(path)["meta"]["heads"]
        return heads
    scores = score_heads(config, accelerator, teacher, head, data)
    heads = choose_heads(config, scores)
    if accelerator.is_main_process:
        scores.save(folder / "head_scores.json")
    counts = sorted({len(kept) for kept in heads})
    LOG.info("kept heads per block (%s): %s", config.prune.method, counts)
    return heads


def baseline(
    config: Config,
    evaluate: Evaluator,
    teacher: EVAViT,
    heads: list[list[int]],
    folder: Path,
    resume: bool,
) -> dict[str, float]:
    """Held-out quality of teacher and pruned student, measured once per run."""
    path = folder / "baseline.json"
    if resume and path.is_file():
        known: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return known
    pruned = build_student(config, teacher, heads)
    quality = {"teacher": evaluate(teacher), "pruned": evaluate(pruned)}
    if evaluate.accelerator.is_main_process:
        path.write_text(json.dumps(quality) + "\n", encoding="utf-8")
    text = ", ".join(f"{name} {value:.4f}" for name, value in quality.items())
    LOG.info("held-out %s before training: %s", evaluate.name, text)
    return quality


def identity(config: Config) -> dict[str, Any]:
    """The part of a config that must not change when a run is resumed."""
    tree: dict[str, Any] = plain(config)
    for section, names in FREE.items():
        part = tree[section] if section else tree
        for name in names:
            del part[name]
    return tree


def finish(
    config: Config,
    accelerator: Accelerator,
    folder: Path,
    models: dict[str, EVAViT],
    head: nn.Module | None,
    quality: dict[str, float],
    data: Data,
) -> None:
    """Save the student, print the table, draw the picture, and say where everything is."""
    student = models["distilled"]
    paths = {"student": folder / "student.safetensors"}
    save_backbone(student, paths["student"])
    if head is not None:
        paths["head"] = folder / "head.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in head.state_dict().items()}, paths["head"])
    for model in models.values():
        model.eval()
    images, labels = some_views(data.held_out.dataset, accelerator.device)
    lines = measure(models, quality, images[:1], accelerator.autocast)
    metric = "mIoU" if head is not None else "similarity"
    text = write_report(folder, lines, metric, {"config": config.name, "note": config.note})
    named = dict(zip(CLASSES, PALETTE, strict=True))
    with accelerator.autocast():
        paths["picture"] = draw_predictions(
            folder / "predictions.png", models, head, images, labels, named
        )
    paths |= {
        "curves": folder / "curves.png",
        "report": folder / "report.json",
        "steps": folder / "steps.csv",
        "tensorboard": folder / "tensorboard",
        "config": folder / "config.yaml",
        "checkpoint": newest(folder) or folder,
    }
    LOG.info("\n\n%s\n", text)
    for name, path in paths.items():
        LOG.info("%-12s %s", name, path)


def some_views(dataset: ViewDataset, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A few readable held-out images, spread over frames and cameras, and their labels."""
    step = max(1, len(dataset) // VIEWS + 1)
    spread = [*range(0, len(dataset), step), *range(len(dataset))]
    items: list[dict[str, Any]] = []
    for index in dict.fromkeys(spread):
        item = dataset[index]
        if not isinstance(item, Corrupt):
            items.append(item)
        if len(items) == VIEWS:
            break
    labels = None
    if "label" in items[0]:
        labels = torch.stack([item["label"] for item in items])
    return torch.stack([item["image"] for item in items]).to(device), labels


if __name__ == "__main__":
    sys.exit(main())
