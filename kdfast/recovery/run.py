# SPDX-License-Identifier: Apache-2.0
"""Runs a pruning: teacher, head scores, pruned student, distillation, and the report at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from kdfast.configs import plain, save
from kdfast.configs.fields import as_config_error
from kdfast.configs.recovery import Config
from kdfast.data.scenes import CLASSES, PALETTE
from kdfast.machine.files import replacing, write_text
from kdfast.models.checkpoint import save_backbone
from kdfast.models.dense_head import DenseHead
from kdfast.models.eva import EVAViT
from kdfast.recovery.data import Data, build_data, some_views
from kdfast.recovery.evaluate import EvaluateEpochs, Evaluator
from kdfast.recovery.free import FREE
from kdfast.recovery.heads import build_student, choose_heads, score_heads
from kdfast.recovery.objective import Distiller
from kdfast.recovery.optim import adamw, lr_setter, param_groups
from kdfast.recovery.report import draw_predictions, measure, write_report
from kdfast.recovery.teacher import get_teacher, save_head
from kdfast.trainer.commits import changed, load_checkpoint, newest, settle
from kdfast.trainer.job import Job, Length
from kdfast.trainer.logs import LOG
from kdfast.trainer.loop import Loop
from kdfast.trainer.runs import run_folder, show_start
from kdfast.trainer.state import identity, seed_everything

# Images in the picture of predictions.
VIEWS = 4
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
    with as_config_error():
        if accelerator.is_main_process:
            settle(folder)
        accelerator.wait_for_everyone()
        data = build_data(config, accelerator)
        seed_everything(config.seed)
        teacher, head = get_teacher(config, accelerator, data, folder / "teacher", resume=resume)
    Run(config, accelerator, folder, data, teacher, head, resume).train()
    accelerator.wait_for_everyone()
    return 0


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
        """Choose the heads, distil, and write the report."""
        heads = self.heads()
        with as_config_error():
            student = self.student(heads)
            distiller = Distiller(student, self.teacher, self.head, self.config.distill)
            distiller.to(self.accelerator.device)
        evaluate = self.evaluator()
        quality = self.baseline(heads, evaluate)
        # Ranks draw different drop paths; the order and the masks come from the config's seed.
        seed_everything(self.config.seed + self.accelerator.process_index)
        with as_config_error():
            loop = Loop(self.job(distiller, heads, evaluate), self.accelerator)
        loop.fit(resume=self.resume)
        if self.accelerator.is_main_process:
            save(self.config, self.folder / "config.yaml")
        self.accelerator.free_memory()
        quality["distilled"] = evaluate(student)
        if self.accelerator.is_main_process:
            pruned = self.student(heads)
            self.finish({"teacher": self.teacher, "pruned": pruned, "distilled": student}, quality)

    def heads(self) -> list[list[int]]:
        """The student's heads: those of the run that is resumed, else chosen by score."""
        path = newest(self.folder) if self.resume else None
        if path is not None:
            with as_config_error():
                kept: list[list[int]] = load_checkpoint(path)["meta"]["heads"]
            return kept
        config = self.config.prune
        scores = score_heads(
            self.teacher,
            self.head,
            self.data.calibration,
            config,
            self.accelerator,
            seed=self.config.seed,
        )
        kept = choose_heads(config, scores)
        if self.accelerator.is_main_process:
            scores.save(self.folder / "head_scores.json")
        counts = sorted({len(block) for block in kept})
        LOG.info("kept heads per block (%s): %s", config.method, counts)
        return kept

    def student(self, heads: list[list[int]]) -> EVAViT:
        """The pruned teacher, untrained."""
        return build_student(self.teacher, heads, checkpointing=self.config.run.checkpointing)

    def evaluator(self) -> Evaluator:
        """Measures backbones by the labels, or without them by likeness to the teacher."""
        return Evaluator(
            self.accelerator,
            self.data.held_out,
            self.head,
            self.teacher if self.head is None else None,
            self.config.run.eval_images,
        )

    def baseline(self, heads: list[list[int]], evaluate: Evaluator) -> dict[str, float]:
        """Held-out quality of teacher and pruned student, measured once per run."""
        known = self.known_baseline() if self.resume else None
        if known is not None:
            return known
        quality = {"teacher": evaluate(self.teacher), "pruned": evaluate(self.student(heads))}
        if self.accelerator.is_main_process:
            content = {"eval_images": self.config.run.eval_images, **quality}
            write_text(self.folder / BASELINE, json.dumps(content) + "\n")
        text = ", ".join(f"{name} {value:.4f}" for name, value in quality.items())
        LOG.info("held-out %s before training: %s", evaluate.name, text)
        return quality

    def known_baseline(self) -> dict[str, float] | None:
        """What an earlier part of the run measured on as many images; None: it has to be done."""
        path = self.folder / BASELINE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            images, names = content["eval_images"], ("teacher", "pruned")
            quality = {name: float(content[name]) for name in names}
            whole = not changed(self.folder, path)
        except (KeyError, TypeError, ValueError) as error:
            LOG.info("%s is not whole and is made again: %s", path, error)
            return None
        return quality if whole and images == self.config.run.eval_images else None

    def job(self, distiller: Distiller, heads: list[list[int]], evaluate: Evaluator) -> Job:
        """The distillation as the loop takes it.

        Raises:
            ValueError: A step needs more batches than an epoch has.
        """
        run, optim, student = self.config.run, self.config.optim, distiller.student
        length = Length(
            epochs=run.epochs,
            batches=len(self.data.train),
            accumulate=run.accumulate,
            max_steps=run.max_steps,
            save_every=run.save_every,
            log_every=run.log_every,
        )
        optimizer = adamw(param_groups(distiller, optim, len(student.blocks)), optim)
        recipe = identity(plain(self.config), FREE)
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
            meta={"stage": "distil", "config": recipe, "heads": heads},
            watch=EvaluateEpochs("distil", evaluate, student),
            beside=(self.folder / BASELINE,),
        )

    def finish(self, models: dict[str, EVAViT], quality: dict[str, float]) -> None:
        """Save the student, print the table, draw the picture, and say where everything is.

        Args:
            models: ``teacher``, ``pruned`` and ``distilled``.
            quality: Held-out metric of each.
        """
        folder, head, autocast = self.folder, self.head, self.accelerator.autocast
        paths = {"student": folder / "student.safetensors"}
        save_backbone(models["distilled"], paths["student"])
        if head is not None:
            paths["head"] = folder / "head.safetensors"
            with replacing(paths["head"]) as partial:
                save_head(head, partial)
        for model in models.values():
            model.eval()
        device = self.accelerator.device
        images, labels = some_views(self.data.held_out.dataset, VIEWS, device)
        lines = measure(models, quality, images[:1], autocast)
        metric = "mIoU" if head is not None else "similarity"
        facts: dict[str, object] = {"config": self.config.name, "note": self.config.note}
        text = write_report(folder, lines, metric, facts)
        named = dict(zip(CLASSES, PALETTE, strict=True))
        with autocast():
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
