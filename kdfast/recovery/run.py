# SPDX-License-Identifier: Apache-2.0
"""Runs a pruning: teacher, head scores, compensated student, distillation, and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kdfast.configs import plain, save
from kdfast.configs.fields import as_config_error
from kdfast.configs.recovery import Config
from kdfast.data.scenes import CLASSES, PALETTE
from kdfast.machine.files import replacing, write_text
from kdfast.models.checkpoint import load_backbone, save_backbone
from kdfast.models.dense_head import DenseHead
from kdfast.models.eva import EVAViT
from kdfast.pruning import Calibration, head_scores, prune_heads
from kdfast.pruning.heat_map import draw_head_scores
from kdfast.pruning.keep import counted
from kdfast.recovery.compensation import (
    CalibrationViews,
    calibrate_teacher,
    compensated_student,
)
from kdfast.recovery.data import Data, build_data, some_views
from kdfast.recovery.evaluate import EvaluateEpochs, Evaluator
from kdfast.recovery.fit_teacher import save_head
from kdfast.recovery.free import DEFAULTS, FREE
from kdfast.recovery.heads import Kept, choose_heads, choose_units, heads_of_file, score_heads
from kdfast.recovery.objective import Distiller
from kdfast.recovery.optim import adamw, lr_setter, param_groups
from kdfast.recovery.page import SCORES, write_run_page
from kdfast.recovery.report import draw_predictions, measure, write_report
from kdfast.recovery.teacher import get_teacher
from kdfast.trainer.commits import changed, load_checkpoint, newest, settle
from kdfast.trainer.job import Job, Length
from kdfast.trainer.logs import LOG
from kdfast.trainer.loop import Loop
from kdfast.trainer.progress import deal_steps
from kdfast.trainer.runs import run_folder, show_start, started_again
from kdfast.trainer.sharding import shard, whole
from kdfast.trainer.state import differences, identity, seed_everything

# Images in the picture of predictions.
VIEWS = 4
# The student as it was before training, where it was compensated.
COMPENSATED = "compensated.safetensors"
BASELINE = "baseline.json"


def run_recovery(config: Config, accelerator: Accelerator, *, resume: bool) -> int:
    """Prune a teacher's heads and win the loss back by distillation.

    Args:
        config: The run.
        accelerator: Device, precision and processes.
        resume: Go on with the newest run of ``config.output``.

    Raises:
        ConfigError: The config, the data or a checkpoint cannot be used.
        Interrupted: A signal came; the state was saved.
        NonFiniteLoss: A training broke; the state before was saved.
    """
    resume = resume or started_again(Path(config.output).expanduser(), accelerator)
    folder = started(config, accelerator, resume=resume)
    with as_config_error():
        data = build_data(config, accelerator)
        seed_everything(config.seed)
        teacher, head = get_teacher(config, accelerator, data, folder / "teacher", resume=resume)
    Run(config, accelerator, folder, data, teacher, head, resume).train()
    accelerator.wait_for_everyone()
    return 0


def started(config: Config, accelerator: Accelerator, *, resume: bool) -> Path:
    """The folder of a run, claimed, with the first lines of its log.

    Raises:
        ConfigError: There is no run to resume, or another process has the folder.
    """
    missing = "--resume: " if resume else None
    folder = run_folder(Path(config.output).expanduser(), accelerator, missing)
    words = [f"{accelerator.num_processes} x {accelerator.device}"]
    words += [f"precision {config.run.precision}", f"{torch.get_num_threads()} threads"]
    words += [f"data: {config.data.kind} {config.data.root or ''}".strip()]
    show_start(
        folder,
        accelerator,
        name=config.name,
        note=config.note,
        what=", ".join(words),
        save=partial(save, config),
        resume=resume,
    )
    if accelerator.is_main_process:
        settle(folder)
    accelerator.wait_for_everyone()
    return folder


@dataclass(frozen=True)
class Run:
    """A pruning run whose data and teacher are there.

    Attributes:
        config: The run.
        accelerator: Device, precision and processes.
        folder: Where all files go.
        data: The images.
        teacher: The model that is pruned and teaches.
        head: Gives logits from its features; None for data without labels.
        resume: Whether the run goes on.
    """

    config: Config
    accelerator: Accelerator
    folder: Path
    data: Data
    teacher: EVAViT
    head: DenseHead | None
    resume: bool

    def train(self) -> None:
        """Choose the heads, compensate, distil, and write the report."""
        with as_config_error():
            kept, student = self.start()
            distiller = self.distiller(student)
            distiller.to(self.accelerator.device)
        evaluate = self.evaluator()
        quality = self.baseline(kept, evaluate)
        if self.config.run.shard == "fsdp":
            with as_config_error():
                shard(distiller, [self.teacher, student], self.accelerator)
        # Ranks draw different drop paths; the order and the masks come from the config's seed.
        seed_everything(self.config.seed + self.accelerator.process_index)
        with as_config_error():
            loop = Loop(self.job(distiller, kept, evaluate), self.accelerator)
        loop.fit(resume=self.resume)
        if self.accelerator.is_main_process:
            save(self.config, self.folder / "config.yaml")
        self.accelerator.free_memory()
        replace(self, teacher=whole(self.teacher)).report(kept, whole(student), quality)

    def report(self, kept: Kept, student: EVAViT, quality: dict[str, float]) -> None:
        """Measure the trained student, and write everything down."""
        quality["distilled"] = self.evaluator()(student)
        if self.accelerator.is_main_process:
            models = {"teacher": self.teacher, **self.untrained(kept), "distilled": student}
            self.finish(models, quality)
            page = write_run_page(self.folder, self.config)
            LOG.info("%-12s %s", "page", page)

    def start(self) -> tuple[Kept, EVAViT]:
        """What is kept, and the student to train: those of the run that is resumed, else new."""
        path, config = newest(self.folder) if self.resume else None, self.config.prune
        views = CalibrationViews(self.data.calibration, config.calibration_views)
        calibration: Calibration | None = None
        if path is not None:
            meta = load_checkpoint(path)["meta"]
            kept = Kept(meta["heads"], meta.get("units"))
            # The loop will refuse another recipe, whose student must not be kept as this run's.
            other = differences(meta["config"], self.recipe(), DEFAULTS)
            known = (self.folder / COMPENSATED).is_file() or other
            if known or not config.compensate:
                # The checkpoint replaces its weights.
                return kept, self.cut(kept)
        else:
            if config.method == "reconstruction" and config.heads is None:
                calibration = self.calibration(views)
            heads = self.heads(calibration)
            if calibration is None and config.compensate:
                calibration = self.calibration(views)
            kept = Kept(heads, self.units(calibration))
        if not config.compensate:
            return kept, self.cut(kept)
        if calibration is None:
            calibration = self.calibration(views)
        student = compensated_student(
            self.teacher, kept, calibration, views, config, self.accelerator
        )
        if self.accelerator.is_main_process:
            save_backbone(student, self.folder / COMPENSATED)
        self.accelerator.wait_for_everyone()
        return kept, self.trainable(student)

    def calibration(self, views: CalibrationViews) -> Calibration:
        """Moments of what may be removed of the teacher."""
        mlps = self.config.prune.mlp_keep is not None
        return calibrate_teacher(self.teacher, views, self.accelerator, mlps=mlps)

    def units(self, calibration: Calibration | None) -> list[list[int]] | None:
        """The hidden units with the best scores; None where all are kept."""
        main = self.accelerator.is_main_process
        units = choose_units(self.teacher, self.config.prune, calibration, progress=main)
        if units is not None:
            words = counted(units, self.teacher.mlp_hidden, "hidden units")
            LOG.info("kept hidden units: %s", words)
        return units

    def recipe(self) -> dict[str, Any]:
        """What a resumed run must have in common with its beginning."""
        return identity(plain(self.config), FREE)

    def heads(self, calibration: Calibration | None) -> list[list[int]]:
        """The heads that ``prune.heads`` names, or else those with the best scores.

        Args:
            calibration: For the method "reconstruction"; None for the others.
        """
        config, main = self.config.prune, self.accelerator.is_main_process
        sizes = [len(heads) for heads in self.teacher.heads]
        if (named := heads_of_file(config, self.teacher)) is not None:
            LOG.info("kept heads (%s): %s", config.heads, counted(named, sizes))
            return named
        if calibration is None:
            seed, images = self.config.seed, self.data.scoring
            scores = score_heads(
                self.teacher, self.head, images, config, self.accelerator, seed=seed
            )
        else:
            scores = head_scores(self.teacher, config.method, calibration, progress=main)
        kept = choose_heads(config, scores)
        if main:
            scores.save(self.folder / "head_scores.json")
            draw_head_scores(scores, kept, self.folder / SCORES)
        LOG.info("kept heads (%s): %s", config.method, counted(kept, sizes))
        return kept

    def trainable(self, student: EVAViT) -> EVAViT:
        """The student, set to be trained as the config says."""
        student.with_cp = self.config.run.checkpointing
        return student.requires_grad_(True)

    def cut(self, kept: Kept) -> EVAViT:
        """The teacher with what is kept alone."""
        return self.trainable(prune_heads(self.teacher, kept.heads, mlp=kept.units))

    def untrained(self, kept: Kept) -> dict[str, EVAViT]:
        """The student before training: ``pruned``, and ``compensated`` where the config says so."""
        models = {"pruned": self.cut(kept)}
        if self.config.prune.compensate:
            compensated = load_backbone(self.folder / COMPENSATED)
            models["compensated"] = compensated.to(self.accelerator.device)
        return models

    def distiller(self, student: EVAViT) -> Distiller:
        """The objective of the run."""
        return Distiller(student, self.teacher, self.head, self.config.distill)

    def evaluator(self) -> Evaluator:
        """Measures backbones by the labels, or without them by likeness to the teacher."""
        return Evaluator(
            self.accelerator,
            self.data.held_out,
            self.head,
            self.teacher if self.head is None else None,
            self.config.run.eval_images,
        )

    def baseline(self, kept: Kept, evaluate: Evaluator) -> dict[str, float]:
        """Held-out quality of the teacher and the untrained student, measured once per run."""
        known = self.known_baseline() if self.resume else None
        if known is not None:
            return known
        models = {"teacher": self.teacher, **self.untrained(kept)}
        quality = {name: evaluate(model) for name, model in models.items()}
        if self.accelerator.is_main_process:
            content = {"eval_images": self.config.run.eval_images, **quality}
            write_text(self.folder / BASELINE, json.dumps(content) + "\n")
        text = ", ".join(f"{name} {value:.4f}" for name, value in quality.items())
        LOG.info("held-out %s: %s", evaluate.name, text)
        return quality

    def known_baseline(self) -> dict[str, float] | None:
        """What an earlier part of the run measured on as many images; None: it has to be done."""
        path = self.folder / BASELINE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            images, names = content["eval_images"], ["teacher", "pruned"]
            names += ["compensated"] if self.config.prune.compensate else []
            quality = {name: float(content[name]) for name in names}
            whole = not changed(self.folder, path)
        except (KeyError, TypeError, ValueError) as error:
            LOG.info("%s is not whole and is made again: %s", path, error)
            return None
        return quality if whole and images == self.config.run.eval_images else None

    def job(self, distiller: Distiller, kept: Kept, evaluate: Evaluator) -> Job:
        """The distillation as the loop takes it.

        Raises:
            ValueError: A step needs more images than an epoch has, or the processes cannot share
                them.
        """
        run, optim, student = self.config.run, self.config.optim, distiller.student
        earlier = self.folder if self.resume else None
        deal_steps(self.data.train, self.accelerator, accumulate=run.accumulate, goes_on=earlier)
        length = Length(
            epochs=run.epochs,
            per_epoch=self.data.train.steps,
            max_steps=run.max_steps,
            save_every=run.save_every,
            log_every=run.log_every,
        )
        optimizer = adamw(param_groups(distiller, optim, len(student.blocks)), optim)
        return Job(
            title="distil",
            folder=self.folder,
            logs=self.folder,
            module=distiller,
            feed=self.data.train,
            length=length,
            optimizer=optimizer,
            set_lr=lr_setter(optimizer, optim, length.total),
            clip=optim.clip,
            meta={"stage": "distil", "config": self.recipe(), **kept.meta()},
            defaults={"config": DEFAULTS},
            watch=EvaluateEpochs("distil", evaluate, student),
            beside=(self.folder / BASELINE,),
        )

    def finish(self, models: dict[str, EVAViT], quality: dict[str, float]) -> None:
        """Save the student, print the table, draw the picture, and say where everything is.

        Args:
            models: ``teacher``, ``pruned``, perhaps ``compensated``, and ``distilled``.
            quality: Held-out metric of each.
        """
        folder, head, autocast = self.folder, self.head, self.accelerator.autocast
        paths = {"student": folder / "student.safetensors"}
        save_backbone(models["distilled"], paths["student"], orion_keys=self.config.run.orion_keys)
        if "compensated" in models:
            paths["compensated"] = folder / COMPENSATED
        if head is not None:
            paths["head"] = folder / "head.safetensors"
            with replacing(paths["head"]) as partial:
                save_head(head, partial)
        if (folder / SCORES).is_file():
            paths["head scores"] = folder / SCORES
        for model in models.values():
            model.eval()
        lines = measure(models, quality, self.shown()[0][:1], autocast)
        metric = self.evaluator().name
        facts: dict[str, object] = {"config": self.config.name, "note": self.config.note}
        text = write_report(folder, lines, metric, facts)
        with autocast():
            paths["picture"] = self.picture(models, folder / "predictions.png")
        paths |= {
            "curves": folder / "curves.png",
            "report": folder / "report.json",
            "steps": folder / "steps.csv",
            "config": folder / "config.yaml",
            "checkpoint": newest(folder) or folder,
        }
        LOG.info("\n\n%s\n", text)
        for name, path in paths.items():
            LOG.info("%-12s %s", name, path)

    def shown(self) -> tuple[Tensor, Tensor | None]:
        """Held-out images for the picture, and their labels."""
        return some_views(self.data.held_out.dataset, VIEWS, self.accelerator.device)

    def picture(self, models: dict[str, EVAViT], path: Path) -> Path:
        """What every model makes of some held-out images."""
        images, labels = self.shown()
        named = dict(zip(CLASSES, PALETTE, strict=True))
        return draw_predictions(path, models, self.head, images, labels, named)


def _counts(kept: list[list[int]]) -> list[int]:
    """The different numbers of what blocks keep."""
    return sorted({len(block) for block in kept})
