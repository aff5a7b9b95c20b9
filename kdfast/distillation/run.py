# SPDX-License-Identifier: Apache-2.0
"""The training of a distillation: models measured, trained, measured again and written down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim._optim_factory import create_optimizer_v2
from torch import Tensor, nn

from kdfast.configs.distil import DistilConfig
from kdfast.configs.fields import ConfigError, as_config_error, defaults_of, plain
from kdfast.data.labelled import LabelledImages
from kdfast.distillation.evaluate import DistilWatch, Evaluator, Quality, in_words
from kdfast.distillation.objective import Objective, unreached
from kdfast.distillation.pictures import Listed, build_pictures
from kdfast.distillation.report import (
    AFTER,
    BEFORE,
    LOOKED_AT,
    TEACHER,
    Line,
    draw_looks,
    draw_quality,
    looked_at,
    measured,
    write_distil_page,
    write_report,
)
from kdfast.distillation.terms import Terms
from kdfast.machine.files import replacing
from kdfast.machine.weights import tensors_digest
from kdfast.models.prepared import PreparedModel, input_config
from kdfast.nn import accelerate
from kdfast.pictures import Attentions
from kdfast.pruning.architecture import described
from kdfast.pruning.saving import save_pretrained
from kdfast.trainer.class_feed import class_feed
from kdfast.trainer.commits import newest, settle
from kdfast.trainer.job import Job, Length
from kdfast.trainer.logs import LOG
from kdfast.trainer.loop import Loop
from kdfast.trainer.progress import deal_steps
from kdfast.trainer.schedule import cosine_with_warmup
from kdfast.trainer.state import identity, seed_everything

# Options that move files or stop the run elsewhere: what is computed stays the same.
FREE = ("output", "workers", "device", "max_steps", "save_every", "log_every")
STUDENT, WEIGHTS = "student", "student.pt"
# Of the learning rate at the first and at the last step.
FIRST, LAST = 0.1, 0.01


@dataclass(frozen=True)
class Distilled:
    """A distillation that ended.

    Attributes:
        student: The trained model, in eval mode.
        folder: Folder of the run.
        saved: What ``kdfast.load_pretrained`` reads, or the weights alone where the student's
            family cannot be saved that way.
        lines: The table: teacher, student before, distilled.
    """

    student: nn.Module
    folder: Path
    saved: Path
    lines: list[Line]


@dataclass(frozen=True)
class Run:
    """A distillation whose folder is there.

    Attributes:
        config: The options.
        accelerator: Device, precision and processes.
        folder: Where all files go.
        student: The model that is trained.
        teacher: The model that it imitates.
        terms: What is compared.
        listed: The picture files.
        numbers: The model's number of each class folder.
        side: Of the pictures, in pixels.
        names: Of student and teacher.
        resume: Whether the run goes on.
    """

    config: DistilConfig
    accelerator: Accelerator
    folder: Path
    student: PreparedModel
    teacher: PreparedModel
    terms: Terms
    listed: Listed
    numbers: list[int]
    side: int
    names: tuple[str, str]
    resume: bool

    def train(self) -> Distilled | None:
        """Measure, train, measure again, and write everything down."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            with as_config_error():
                settle(self.folder)
        accelerator.wait_for_everyone()
        self.say()
        digests = {"student": _digest(self.student.net), "teacher": _digest(self.teacher.net)}
        unsavable = _unsavable(self.student.net)
        if unsavable:
            LOG.info("the student will be saved as weights alone: %s", unsavable)
        inputs = input_config(self.student.net)
        pictures = build_pictures(self.listed, config, self.side, inputs, self.numbers)
        for model in (self.teacher, self.student):
            model.to(accelerator.device)
        objective = self.objective()
        if config.accelerate:
            for name, model in zip(
                ("student", "teacher"), (self.student, self.teacher), strict=True
            ):
                LOG.info("%s: %s", name, str(accelerate(model.net)).splitlines()[0])
        some = self.some(pictures.held)
        seen = self.looks({TEACHER: self.teacher, BEFORE: self.student}, some)
        evaluate = self.evaluator(pictures.held)
        watch = DistilWatch("distil", evaluate, self.student)
        meta = {
            "config": identity(plain(config), FREE),
            "data": pictures.digest,
            **digests,
        }
        with as_config_error():
            loop = Loop(self.job(objective, pictures.train, watch, meta), accelerator)
        if not (self.resume and newest(self.folder)):
            watch.before = self.baseline(evaluate)
        # Processes draw different drop paths; the order and the crops come from the seed.
        seed_everything(config.seed + accelerator.process_index)
        loop.fit(resume=self.resume)
        accelerator.free_memory()
        if not loop.done:
            LOG.info("stopped by max_steps; --resume goes on")
            return None
        return self.finish(watch, seen, some, unsavable)

    def say(self) -> None:
        """What is compared, and what is not."""
        terms = self.terms
        LOG.info("%s", terms.kinship)
        for term, weight in terms.weights.items():
            note = next((n for n in terms.notes if n.startswith(f"{term}: ")), "")
            LOG.info("%s, weight %g%s", term, weight, f"{note.removeprefix(term)}")
        for term, reason in terms.left_out.items():
            LOG.info("%s is left out: %s", term, reason)

    def objective(self) -> Objective:
        """The objective on the run's device; parameters that nothing depends on are frozen."""
        objective = Objective(self.student, self.teacher, self.terms, self.config)
        objective.to(self.accelerator.device)
        names = unreached(objective, (self.side, self.side))
        for name in names:
            self.student.net.get_parameter(name).requires_grad_(False)
        if names:
            LOG.info("no term depends on %s: left as it is", ", ".join(names))
        if not any(p.requires_grad for p in objective.parameters()):
            raise ConfigError(["student: must have parameters that require gradients, got none"])
        return objective

    def evaluator(self, held: LabelledImages) -> Evaluator:
        """Measures on this process's share of the held-out pictures."""
        feed = class_feed(
            held,
            batch_size=self.config.batch_size,
            device=self.accelerator.device,
            workers=self.config.workers,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            train=False,
        )
        return Evaluator(
            self.accelerator,
            feed,
            self.teacher,
            comparable=self.terms.comparable,
            logits=self.terms.comparable and self.terms.classes is not None,
            labels=self.config.labels,
        )

    def baseline(self, evaluate: Evaluator) -> dict[str, Quality]:
        """Held-out quality of both models before the training."""
        found = {"teacher": evaluate(self.teacher), "student": evaluate(self.student)}
        for name, quality in found.items():
            LOG.info("%s before training: %s", name, in_words(quality))
        return found

    def job(
        self,
        objective: Objective,
        train: LabelledImages,
        watch: DistilWatch,
        meta: dict[str, Any],
    ) -> Job:
        """The distillation as the loop takes it."""
        config, accelerator = self.config, self.accelerator
        feed = class_feed(
            train,
            batch_size=config.batch_size,
            device=accelerator.device,
            workers=config.workers,
            seed=config.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        deal_steps(feed, accelerator, goes_on=self.folder if self.resume else None)
        length = Length(
            epochs=config.epochs,
            per_epoch=feed.steps,
            max_steps=config.max_steps,
            save_every=config.save_every,
            log_every=config.log_every,
        )
        optimizer = create_optimizer_v2(
            objective, opt="adamw", lr=config.lr, weight_decay=config.weight_decay
        )
        warmup = round(length.total * config.warmup)
        factor = cosine_with_warmup(length.total, warmup=warmup, warmup_ratio=FIRST, min_ratio=LAST)

        def set_lr(step: int) -> float:
            lr = config.lr * factor(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            return lr

        LOG.info(
            "AdamW, lr %g, %d steps of %d pictures, warm-up of %d",
            *(config.lr, length.total, feed.shares.together, warmup),
        )
        return Job(
            title="distil",
            folder=self.folder,
            logs=self.folder,
            module=objective,
            feed=feed,
            length=length,
            optimizer=optimizer,
            set_lr=set_lr,
            clip=config.clip,
            meta=meta,
            defaults={"config": defaults_of(DistilConfig)},
            watch=watch,
        )

    def some(self, held: LabelledImages) -> Tensor:
        """The first held-out pictures, (B, 3, S, S), on the run's device."""
        items = [held[i]["image"] for i in range(min(LOOKED_AT, len(held)))]
        return torch.stack(items).to(self.accelerator.device)

    def looks(self, models: dict[str, PreparedModel], images: Tensor) -> dict[str, Attentions]:
        """Where models look, by name; only in the main process, and nothing where one is blind."""
        if not self.accelerator.is_main_process:
            return {}
        found: dict[str, Attentions] = {}
        for name, model in models.items():
            seen = looked_at(model, images)
            if seen is None:
                return {}
            found[name] = seen
        return found

    def finish(
        self,
        watch: DistilWatch,
        seen: dict[str, Attentions],
        images: Tensor,
        unsavable: str,
    ) -> Distilled:
        """Save the student, print the table, draw the pictures, and say where everything is."""
        folder, accelerator = self.folder, self.accelerator
        self.student.eval()
        quality = {
            TEACHER: watch.before["teacher"],
            BEFORE: watch.before["student"],
            AFTER: watch.newest(),
        }
        models = {TEACHER: self.teacher, AFTER: self.student}
        saved = folder / (WEIGHTS if unsavable else STUDENT)
        lines: list[Line] = []
        if accelerator.is_main_process:
            if unsavable:
                with replacing(saved) as partial:
                    torch.save(self.student.net.state_dict(), partial)
            else:
                save_pretrained(self.student.net, saved)
            lines = measured(models, quality, images[:1], accelerator.autocast)
            facts = {"student": self.names[0], "teacher": self.names[1], **self.facts()}
            text = write_report(folder, lines, facts)
            title = f"{self.names[0]}, taught by {self.names[1]}"
            paths = {"student": saved, "report": folder / "report.txt"}
            paths["quality"] = draw_quality(folder / "quality.png", watch.rows, watch.before, title)
            after = self.looks({AFTER: self.student}, images) if seen else {}
            if after:
                paths["attention"] = draw_looks(folder / "attention.png", {**seen, **after}, title)
            options = plain(self.config)
            paths["page"] = write_distil_page(folder, lines, self.terms, options)
            paths |= {"curves": folder / "curves.png", "steps": folder / "steps.csv"}
            paths |= {"tensorboard": folder / "tensorboard", "config": folder / "config.yaml"}
            LOG.info("\n\n%s\n", text)
            for name, path in paths.items():
                LOG.info("%-12s %s", name, path)
        accelerator.wait_for_everyone()
        return Distilled(self.student.net, folder, saved, lines)

    def facts(self) -> dict[str, Any]:
        """What the report says beside the table."""
        terms = self.terms
        return {
            "cut": terms.cut,
            "kinship": terms.kinship,
            "terms": terms.weights,
            "left_out": terms.left_out,
            "train_pictures": len(self.listed.train),
            "held_out_pictures": len(self.listed.held),
            "config": plain(self.config),
        }


def _digest(net: nn.Module) -> str:
    """Hash of a model's weights."""
    return tensors_digest({k: v.detach().cpu() for k, v in net.state_dict().items()}, {})


def _unsavable(net: nn.Module) -> str:
    """Why ``save_pretrained`` cannot write a model; "" if it can."""
    try:
        described(net, {})
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("save_pretrained: ")
    return ""
