# SPDX-License-Identifier: Apache-2.0
"""Trains one link of a chain: its models, the teacher's outputs, and the job for the loop."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdfast.chain.evaluate import ClassEvaluator, held_out_feed
from kdfast.chain.kept_logits import kept_logits
from kdfast.chain.link_run import DEFAULTS, LinkRun, checkpoints_of
from kdfast.chain.links import LinkModel, build_link, described_link, facts, load_teacher
from kdfast.chain.objective import Objective
from kdfast.chain.optim import timm_lr_setter, timm_optimizer, warmup_of
from kdfast.chain.planning import batch_size
from kdfast.chain.step import LinkStep, mixup_of
from kdfast.chain.summary import finish_link, summary_of
from kdfast.chain.watch import LinkWatch
from kdfast.chain.weights import TaskWeights, described, task_weights
from kdfast.configs.fields import as_config_error
from kdfast.data.labelled import Classification
from kdfast.machine.memory import release
from kdfast.nn import accelerate
from kdfast.trainer.class_feed import class_feed, even_part
from kdfast.trainer.commits import BEST, settle
from kdfast.trainer.job import Job, Length
from kdfast.trainer.logs import FILE_ONLY, LOG
from kdfast.trainer.loop import Loop
from kdfast.trainer.progress import deal_steps
from kdfast.trainer.state import seed_everything


def train_link(run: LinkRun, accelerator: Accelerator, *, resume: bool) -> dict[str, Any] | None:
    """Train, test and describe a link.

    Args:
        run: What is trained.
        accelerator: Device, precision and processes.
        resume: Keep a finished link, go on with an interrupted one.

    Returns:
        Its summary; None if ``max_steps`` ended it early.

    Raises:
        ConfigError: A model or a checkpoint does not fit, or a resumed link had another recipe.
    """
    known = summary_of(run) if resume else None
    if known is not None:
        return known
    if accelerator.is_main_process:
        if not resume:
            _move_aside(run.folder)
        with as_config_error():
            for folder in (run.folder, run.teacher_folder):
                if folder is not None:
                    settle(checkpoints_of(folder))
    accelerator.wait_for_everyone()
    began = time.monotonic()
    config, link, device = run.config, run.link, accelerator.device
    student, teacher, description = _models(run, accelerator)
    batch = batch_size(run, student, device, resume=resume)
    kept = None
    if teacher is not None:
        teacher.to(device)
        if config.cache:
            kept, teacher = kept_logits(run, teacher, accelerator), None
            release(device)
    with as_config_error():
        weights = _weights(run)
        objective = Objective(
            student,
            teacher,
            run.data.task,
            config.distill,
            epochs=link.epochs,
            distilled=run.teacher is not None,
            size=(config.data.size, config.data.size),
            weights=weights,
        ).to(device)
        classes = len(run.data.class_names)
        step = LinkStep(mixup_of(config.optim, run.data.task, classes), kept)
        evaluate = ClassEvaluator(accelerator, run.data.task, classes)
        val = held_out_feed(run, run.data.val, device)
        watch = LinkWatch(run, student, step, val, evaluate, batch)
        meta = {**facts(link, run.data, description), "recipe": run.recipe}
        job = _job(run, objective, batch, step, watch, meta, resume=resume)
        loop = Loop(job, accelerator)
    LOG.info(
        "%s, seed %d: %s, %s", link.role, run.seed, link.model, f"{student.count:,} parameters"
    )
    if (warmup := warmup_of(config.optim, link.epochs)) != config.optim.warmup_epochs:
        LOG.info(
            "%s: warm-up cut to %d of %d epochs (optim.warmup_epochs is %d)",
            *(link.role, warmup, link.epochs, config.optim.warmup_epochs),
        )
    together = job.feed.shares.together
    LOG.info("  %d epochs of %d images, batch %d", link.epochs, loop.per_epoch * together, together)
    LOG.info("  in %s", run.folder)
    if words := described(config.distill, weights, run.data.class_names):
        LOG.info("%s: loss of the task: %s", link.role, words)
    try:
        loop.fit(resume=resume)
    finally:
        val.close()
    if not loop.done:
        return None
    seconds = time.monotonic() - began
    summary = finish_link(run, watch, batch=batch, seconds=seconds)
    accelerator.wait_for_everyone()
    return summary


def _weights(run: LinkRun) -> TaskWeights:
    """Weights of the task's loss, balanced over the images that the link is trained on."""
    data, targets = run.data, run.data.train.targets
    chosen = even_part(targets, run.config.data.limit, _data_seed(data))
    targets = targets if chosen is None else targets[chosen]
    return task_weights(run.config.distill, data.task, targets, data.class_names)


def _models(
    run: LinkRun, accelerator: Accelerator
) -> tuple[LinkModel, LinkModel | None, dict[str, Any] | None]:
    """The student as it starts, the finished teacher, and ``described_link`` of the student.

    The generators of random numbers start here.
    """
    config, data, link = run.config, run.data, run.link
    seed_everything(run.seed)
    student = build_link(link, len(data.class_names), checkpointing=config.checkpointing)
    description = described_link(link, student)  # before its attentions are replaced
    teacher = None
    if run.teacher is not None and run.teacher_folder is not None:
        path = checkpoints_of(run.teacher_folder) / BEST
        teacher = load_teacher(path, run.teacher, data)
    if config.accelerate:
        for model in (student, teacher):
            if model is not None:
                _make_fast(link.role if model is student else f"teacher of {link.role}", model)
    if accelerator.process_index:
        # The weights are those of the first process; drop path and Mixup differ on the others.
        seed_everything(run.seed + accelerator.process_index)
    return student, teacher, description


def _make_fast(name: str, model: LinkModel) -> None:
    """Make a model fast; the file of the log gets the report, the terminal what it leaves."""
    report = accelerate(model.net)
    LOG.info("%s: %s", name, report, extra=FILE_ONLY)
    if report.left:
        done, all_of = len(report.replaced), len(report.replaced) + len(report.left)
        LOG.info("%s: %d of %d attentions run fused, see train.log", name, done, all_of)


def _job(
    run: LinkRun,
    objective: Objective,
    batch: int,
    step: LinkStep,
    watch: LinkWatch,
    meta: dict[str, Any],
    *,
    resume: bool,
) -> Job:
    """The link as the loop takes it.

    Raises:
        ValueError: The images do not fill a batch, the processes cannot share them, or timm has no
            optimiser of that name.
    """
    config, link, data, accelerator = run.config, run.link, run.data, watch.accelerator
    feed = class_feed(
        data.train,
        batch_size=batch,
        device=accelerator.device,
        workers=config.data.workers,
        seed=run.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        chosen=even_part(data.train.targets, config.data.limit, _data_seed(data)),
    )
    deal_steps(feed, accelerator, goes_on=run.checkpoints if resume else None)
    step.check(feed.shares)
    length = Length(
        epochs=link.epochs,
        per_epoch=feed.steps,
        max_steps=config.max_steps,
        save_every=config.save_every,
        log_every=config.log_every,
    )
    optimizer = timm_optimizer(objective, config.optim)
    for folder in (run.checkpoints, run.logs):
        folder.mkdir(parents=True, exist_ok=True)
    return Job(
        title=link.role,
        folder=run.checkpoints,
        logs=run.logs,
        module=objective,
        feed=feed,
        length=length,
        optimizer=optimizer,
        set_lr=timm_lr_setter(
            optimizer, config.optim, epochs=link.epochs, per_epoch=length.per_epoch
        ),
        clip=config.optim.clip,
        meta=meta,
        defaults={"recipe": DEFAULTS},
        step=step,
        watch=watch,
        epochs_file=f"{run.name}_log.csv",
    )


def _data_seed(data: Classification) -> int:
    """A seed that follows from the images alone."""
    return int(hashlib.sha256(str(data.facts["content"]).encode()).hexdigest()[:8], 16)


def _move_aside(folder: Path) -> None:
    """Keep what an earlier training of a link left, under another name."""
    if folder.exists():
        number = 1
        while (old := folder.with_name(f"{folder.name}.old{number}")).exists():
            number += 1
        os.replace(folder, old)
        LOG.info("the earlier %s is kept as %s", folder.name, old)
