# SPDX-License-Identifier: Apache-2.0
"""The training of a teacher that later runs with the same settings use again."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from kdfast.configs import plain
from kdfast.configs.recovery import Config, FitTeacherConfig
from kdfast.machine.disk import require_writable
from kdfast.machine.files import clear_partials, replacing
from kdfast.machine.ranks import Ranks
from kdfast.models.checkpoint import save_backbone
from kdfast.models.eva import EVAViT
from kdfast.recovery.evaluate import EvaluateEpochs, Measure
from kdfast.recovery.free import FREE
from kdfast.recovery.optim import adamw, lr_setter, param_groups
from kdfast.trainer.commits import check_file, write_manifest
from kdfast.trainer.feed import Feed
from kdfast.trainer.job import Job, Length
from kdfast.trainer.logs import LOG
from kdfast.trainer.loop import Loop
from kdfast.trainer.progress import deal_steps
from kdfast.trainer.state import identity, seed_everything

# Part of the key of a kept teacher: to be raised when the same config trains another one.
VERSION = 1
H = TypeVar("H", bound=nn.Module)


@dataclass(frozen=True)
class Parts:
    """What one kind of teacher is trained with.

    Attributes:
        module: Backbone and head in the form that the loop trains.
        feed: Training data.
        evaluate: Measures the backbone.
    """

    module: nn.Module
    feed: Feed[Any]
    evaluate: Measure


@dataclass(frozen=True)
class TeacherFit(Generic[H]):
    """Trains a backbone with a head, and keeps both.

    Attributes:
        config: The whole run.
        spec: How the teacher is trained.
        accelerator: Device, precision and processes.
        folder: Where checkpoints and logs go.
    """

    head_name: ClassVar[str]

    config: Config
    spec: FitTeacherConfig
    accelerator: Accelerator
    folder: Path

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the key has of the data besides their config, or in place of a part of it."""

    @abstractmethod
    def new_head(self) -> H:
        """The head as it starts."""

    @abstractmethod
    def parts(self, backbone: EVAViT, head: H) -> Parts:
        """What the training works with."""

    @cached_property
    def path(self) -> Path:
        """File of the trained backbone; its name hashes everything that the training depends on."""
        config = self.config
        key = {
            "version": VERSION,
            "fit": plain(self.spec),
            "data": identity(plain(config), FREE)["data"] | self.facts(),
            "seed": config.seed,
            "precision": config.run.precision,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return Path(config.teacher.cache) / f"teacher-{digest}.safetensors"

    @property
    def head_path(self) -> Path:
        """File of its head."""
        return self.path.with_suffix(f".{self.head_name}.safetensors")

    @property
    def manifest(self) -> Path:
        """Names both with their checksums; it is written last."""
        return self.path.with_suffix(".json")

    def run(self, *, resume: bool) -> H:
        """Train and write both files, unless they are there; returns the trained head."""
        # One answer for all: another run may write it between two looks.
        if Ranks.here().by_main(self.manifest.is_file):
            for path in (self.path, self.head_path):
                check_file(path, self.manifest, f"delete {self.manifest} to train it again")
            LOG.info("teacher of an earlier run with the same settings is used again")
        else:
            self._train(resume)
        head = self.new_head()
        head.load_state_dict(load_file(self.head_path))
        return head

    def _train(self, resume: bool) -> None:
        if self.accelerator.is_main_process:
            require_writable(self.path.parent, "teacher.cache")
        seed_everything(self.config.seed)
        backbone, head = EVAViT(**plain(self.spec.model), with_cp=False), self.new_head()
        parts = self.parts(backbone, head)
        parts.module.to(self.accelerator.device)
        count = sum(p.numel() for p in backbone.parameters())
        LOG.info("training a teacher of %s parameters", f"{count:,}")
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        deal_steps(parts.feed, self.accelerator, goes_on=self.folder if resume else None)
        Loop(self._job(parts, backbone), self.accelerator).fit(resume=resume)
        self.accelerator.free_memory()
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            clear_partials(self.path.parent)
            with replacing(self.head_path) as partial:
                save_head(head, partial)
            save_backbone(backbone, self.path)
            write_manifest(self.manifest, {}, (self.path, self.head_path))
        self.accelerator.wait_for_everyone()

    def _job(self, parts: Parts, backbone: EVAViT) -> Job:
        config, spec = self.config, self.spec
        length = Length(
            epochs=spec.epochs,
            per_epoch=parts.feed.steps,
            save_every=config.run.save_every,
            log_every=config.run.log_every,
        )
        optimizer = adamw(param_groups(parts.module, spec.optim, spec.model.depth), spec.optim)
        return Job(
            title="teacher",
            folder=self.folder,
            logs=self.folder,
            module=parts.module,
            feed=parts.feed,
            length=length,
            optimizer=optimizer,
            set_lr=lr_setter(optimizer, spec.optim, length.total),
            clip=spec.optim.clip,
            meta={"stage": "teacher", "key": self.path.name},
            watch=EvaluateEpochs("teacher", parts.evaluate, backbone),
        )


def save_head(head: nn.Module, path: Path) -> None:
    """Write the weights of a head as safetensors."""
    save_file({k: v.cpu().contiguous() for k, v in head.state_dict().items()}, path)
