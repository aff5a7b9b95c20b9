# SPDX-License-Identifier: Apache-2.0
"""One link of a chain: models, teacher outputs, training, test, and the files about it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from kdfast.chain.feed import ClassBatch, ClassFeed, even_part
from kdfast.chain.links import (
    Link,
    LinkModel,
    build_link,
    facts,
    load_teacher,
    weights_of,
)
from kdfast.chain.loop import BEST, ChainJob, ChainLoop
from kdfast.chain.metrics import Meter
from kdfast.chain.objective import Objective
from kdfast.chain.planning import batch_size
from kdfast.chain.plots import draw_attention, draw_confusion, draw_curves
from kdfast.chain.teacher_cache import TeacherCache, teacher_key
from kdfast.configs import ChainConfig, ConfigError, plain
from kdfast.configs.chain import per_link
from kdfast.configs.recovery import RunConfig
from kdfast.data.labelled import Classification
from kdfast.machine.files import replacing
from kdfast.machine.memory import peak_mib, release
from kdfast.nn import accelerate
from kdfast.trainer.logs import LOG
from kdfast.trainer.loop import differences
from kdfast.trainer.state import load_checkpoint

# What may change between the parts of a run: it moves files, or computes the same.
FREE = (
    *("name", "output", "note", "report", "cache_dir", "save_every", "log_every", "eval_batch"),
    *("device", "max_steps"),
    # Of the chain; a link's own part of it is compared.
    *("stage", "seeds", "vary", "twin", "chain", "model_args", "init", "batch", "epochs"),
    "vram_gib",
)
FREE_DATA = ("root", "workers")


@dataclass(frozen=True)
class Stage:
    """What one call trains.

    Attributes:
        config: The whole chain.
        link: The model.
        seed: Seed of weights, order and masks.
        folder: Of the link.
        teacher: The link that teaches; None: none does.
        teacher_folder: Its folder.
        data: The images.
    """

    config: ChainConfig
    link: Link
    seed: int
    folder: Path
    teacher: Link | None
    teacher_folder: Path | None
    data: Classification

    @property
    def name(self) -> str:
        """Start of the names of the link's files."""
        return f"{self.link.model}_{self.link.role}"


def train_link(stage: Stage, accelerator: Accelerator, *, resume: bool) -> dict[str, Any] | None:
    """Train, test and describe a link.

    Args:
        stage: What.
        accelerator: Device, precision and processes.
        resume: Keep a finished link, go on with an interrupted one.

    Returns:
        Its summary; None if ``max_steps`` ended it early.

    Raises:
        ConfigError: A model or a checkpoint does not fit, or a resumed link had another recipe.
    """
    if resume and (stage.folder / "summary.json").is_file():
        return _finished(stage)
    if not resume and accelerator.is_main_process:
        _move_aside(stage.folder)
    accelerator.wait_for_everyone()
    began = time.monotonic()
    config, data, link = stage.config, stage.data, stage.link
    _seed(stage.seed)
    student = build_link(link, len(data.class_names), checkpointing=config.checkpointing)
    teacher = None
    if stage.teacher is not None and stage.teacher_folder is not None:
        teacher = load_teacher(stage.teacher_folder / "checkpoints" / BEST, stage.teacher, data)
    if config.accelerate:
        for model in (student, teacher):
            if model is not None:
                LOG.info("%s: %s", link.role, accelerate(model.net))
    if accelerator.process_index:
        # The weights are those of the first process; drop path and Mixup differ on the others.
        _seed(stage.seed + accelerator.process_index)
    batch = batch_size(stage, student, accelerator.device)
    loop = _loop(stage, student, teacher, accelerator, batch)
    del teacher
    LOG.info(
        "%s (seed %d): %s, %s parameters, batch %d, %d epochs, %d training images, in %s",
        *(link.role, stage.seed, link.model, f"{_params(student):,}", batch, link.epochs),
        *(loop.per_epoch * batch, stage.folder),
    )
    loop.fit(resume=resume)
    if loop.step < loop.total and not loop.patience_over:
        return None
    summary = _describe(stage, loop, batch, time.monotonic() - began)
    accelerator.wait_for_everyone()
    return summary


def identity(stage: Stage) -> dict[str, Any]:
    """The part of the recipe that must not change when a link is resumed."""
    tree = plain(stage.config)
    for name in FREE:
        del tree[name]
    for name in FREE_DATA:
        del tree["data"][name]
    link = stage.link
    tree |= {"seed": stage.seed, "init": link.init, "epochs": link.epochs}
    tree |= {"distilled": link.distilled, "batch": per_link(stage.config.batch, link.index)}
    return tree


def _loop(
    stage: Stage,
    student: LinkModel,
    teacher: LinkModel | None,
    accelerator: Accelerator,
    batch: int,
) -> ChainLoop:
    config, link, data = stage.config, stage.link, stage.data
    device = accelerator.device
    logits = None
    if teacher is not None:
        teacher.to(device)
        if config.cache:
            logits, teacher = kept_logits(stage, teacher, accelerator), None
            release(device)
    try:
        module = Objective(
            student,
            teacher,
            data.task,
            config.distill,
            epochs=link.epochs,
            distilled=stage.teacher is not None,
        ).to(device)
        feed = ClassFeed(
            data.train,
            batch_size=batch,
            device=device,
            workers=config.data.workers,
            seed=stage.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            chosen=even_part(data.train.targets, config.data.limit, data_seed(data)),
        )
        job = ChainJob(
            title=link.role,
            folder=_made(stage.folder / "checkpoints"),
            module=module,
            depth=0,
            feed=feed,
            optim=config.optim,
            run=RunConfig(
                epochs=link.epochs,
                batch_size=batch,
                precision=config.precision,
                max_steps=config.max_steps,
                save_every=config.save_every,
                log_every=config.log_every,
            ),
            meta={**facts(link, data), "recipe": identity(stage)},
            logs=_made(stage.folder / "logs"),
            epochs_file=f"{stage.name}_log.csv",
            val=eval_feed(stage, data.val, accelerator),
            task=data.task,
            classes=len(data.class_names),
            patience=config.patience,
            logits=logits,
        )
        return ChainLoop(job, accelerator)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def eval_feed(stage: Stage, dataset: Any, accelerator: Accelerator) -> ClassFeed:
    """All items of a held-out set once."""
    return ClassFeed(
        dataset,
        batch_size=stage.config.eval_batch,
        device=accelerator.device,
        workers=stage.config.data.workers,
        train=False,
    )


def data_seed(data: Classification) -> int:
    """A seed that follows from the images alone."""
    return int(hashlib.sha256(str(data.facts["content"]).encode()).hexdigest()[:8], 16)


def kept_logits(
    stage: Stage, teacher: LinkModel, accelerator: Accelerator
) -> Callable[[ClassBatch], Tensor]:
    """The teacher's outputs for all training images and variants, computed now or earlier."""
    config, data = stage.config, stage.data
    key = teacher_key(teacher, data.facts, precision=config.precision)
    few = data.task == "multilabel" or config.cache_top_k >= len(data.class_names)
    top_k = None if few else config.cache_top_k
    kept = {"key": key, "top_k": top_k, "temperature": config.distill.temperature}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.cache_dir or stage.folder.parent / "teacher_cache").expanduser() / digest
    began = time.monotonic()
    if accelerator.is_main_process:
        with accelerator.autocast():
            TeacherCache.build(
                teacher,
                data.train,
                folder,
                key=key,
                top_k=top_k,
                temperature=config.distill.temperature,
                batch_size=config.eval_batch,
                workers=config.data.workers,
            )
    accelerator.wait_for_everyone()
    cache = TeacherCache.open(folder, key)
    LOG.info("%s: teacher outputs in %s, %.1f s", stage.link.role, folder, time.monotonic() - began)
    return lambda batch: cache.logits(batch.index, batch.variant).to(batch.images)


def _describe(stage: Stage, loop: ChainLoop, batch: int, seconds: float) -> dict[str, Any]:
    """Test the best weights and write the files about a finished link."""
    data, link = stage.data, stage.link
    path = stage.folder / "checkpoints" / BEST
    student: LinkModel = loop.objective.student
    student.net.load_state_dict(weights_of(load_checkpoint(path)))
    loop.ema = None
    meter = loop.evaluate(eval_feed(stage, data.test, loop.accelerator))
    test = meter.compute()
    peaks = peak_mib(loop.device)
    summary = {
        "role": link.role,
        "model": link.model,
        "args": link.args,
        "data": data.name,
        "seed": stage.seed,
        "params": _params(student),
        "batch": batch,
        "parts": loop.parts,
        "best_epoch": int(loop.best["epoch"]),
        "val_accuracy": loop.best["val_accuracy"],
        **{f"test_{name}": value for name, value in test.items()},
        "seconds": seconds,
        "peak_mib": peaks["gpu"] or peaks["host"],
        "folder": str(stage.folder),
    }
    if loop.main:
        _write_files(stage, loop, meter, summary)
        LOG.info(
            "%s: best epoch %d, val %.2f, test %.2f, peak memory: GPU %.0f MiB, host %.0f MiB",
            *(link.role, summary["best_epoch"], summary["val_accuracy"], test["accuracy"]),
            *(peaks["gpu"], peaks["host"]),
        )
    return summary


def _write_files(stage: Stage, loop: ChainLoop, meter: Meter, summary: dict[str, Any]) -> None:
    folder, data = stage.folder, stage.data
    logs, pictures = folder / "logs", _made(folder / "visualizations")
    best: dict[str, float] = {}
    for name, (value, epoch) in loop.records_best.items():
        best |= {f"best_{name}": value, f"best_{name}_epoch": epoch}
    seen = meter.gathered()
    scores = meter.per_class(seen["pred"], seen["target"])
    per_class = {
        name: {key: 100 * float(value[i]) for key, value in scores.items()}
        for i, name in enumerate(data.class_names)
    }
    test = {k: v for k, v in summary.items() if k.startswith("test_")}
    counts = meter.confusion(seen["pred"], seen["target"])
    _json(
        logs / f"{stage.name}_best_metrics.json",
        {**best, **test, "test_per_class": per_class, "test_confusion": counts.tolist()},
    )
    recipe = {"config": plain(stage.config), "link": {**stage.link.__dict__}, "seed": stage.seed}
    _json(logs / f"{stage.name}_config.json", recipe)
    size = f"{summary['params'] / 1e6:.2f}M parameters"  # a name of timm says little with args
    title = f"{stage.link.role}: {stage.link.model}, {size}, on {data.name}, seed {stage.seed}"
    note = "train: with distillation" if stage.teacher is not None else "task only"
    draw_curves(logs / f"{stage.name}_log.csv", pictures / "curves.png", title, note)
    draw_confusion(counts, data.class_names, pictures / "confusion.png", f"{title}, test images")
    draw_attention(loop.objective.student, data, pictures, title, loop.device)
    # Last: its presence says that the link is finished.
    _json(folder / "summary.json", {**summary, "recipe": identity(stage)})


def _finished(stage: Stage) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((stage.folder / "summary.json").read_text("utf-8"))
    found = differences(summary.pop("recipe"), json.loads(json.dumps(identity(stage))))
    if found:
        raise ConfigError(
            [f"--resume: {stage.link.role} in {stage.folder} was made with {x}" for x in found]
        )
    LOG.info("%s (seed %d) is finished: %s", stage.link.role, stage.seed, stage.folder)
    return summary


def _move_aside(folder: Path) -> None:
    """Keep what an earlier training of a link left, under another name."""
    if folder.exists():
        number = 1
        while (old := folder.with_name(f"{folder.name}.old{number}")).exists():
            number += 1
        os.replace(folder, old)
        LOG.info("the earlier %s is kept as %s", folder.name, old)


def _json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _seed(seed: int) -> None:
    """The one place where a link's global generators start: weights, drop path and Mixup."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _params(model: LinkModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
