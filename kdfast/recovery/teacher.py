# SPDX-License-Identifier: Apache-2.0
"""The teacher: read from a checkpoint, or trained on labels once and kept for the next run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdfast.configs import plain
from kdfast.configs.recovery import Config, FitTeacherConfig
from kdfast.machine.disk import require_writable
from kdfast.machine.files import clear_partials, replacing
from kdfast.models.checkpoint import load_orion_backbone, save_backbone
from kdfast.models.dense_head import DenseHead
from kdfast.models.eva import EVAViT
from kdfast.recovery.data import Data, view_feed
from kdfast.recovery.evaluate import EvaluateEpochs, Evaluator
from kdfast.recovery.free import FREE
from kdfast.recovery.optim import adamw, lr_setter, param_groups
from kdfast.trainer.commits import check_file, write_manifest
from kdfast.trainer.job import Job, Length
from kdfast.trainer.logs import LOG
from kdfast.trainer.loop import Loop
from kdfast.trainer.state import identity, seed_everything

# Part of the key of a cached teacher: to be raised when the same config trains another one.
VERSION = 1


class Supervised(nn.Module):
    """Backbone and head under plain cross-entropy, in the form that the loop trains."""

    def __init__(self, backbone: EVAViT, head: DenseHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> dict[str, Tensor]:
        """Loss of images (B, 3, H, W) with labels (B, H, W), -100 where there is none."""
        return {"total": F.cross_entropy(self.head(self.backbone(images)).float(), labels)}


def get_teacher(
    config: Config, accelerator: Accelerator, data: Data, folder: Path, *, resume: bool
) -> tuple[EVAViT, DenseHead | None]:
    """Teacher and, for labelled data, its head; both frozen and on the device of the run.

    Args:
        config: Names a checkpoint, or says how to train.
        accelerator: Device and processes.
        data: Used only if the teacher is trained here.
        folder: Checkpoints and logs of that training.
        resume: Continue an interrupted training from ``folder``.

    Raises:
        ValueError: The checkpoint does not fit, or the file of an earlier run is damaged.
        Interrupted: A signal came during the training; its state was saved.
        NonFiniteLoss: The training broke.
    """
    spec, head = config.teacher.fit, None
    if config.teacher.checkpoint is not None:
        path = Path(config.teacher.checkpoint).expanduser()
    elif spec is not None:
        training = TeacherTraining(config, spec, accelerator, data, folder)
        path = training.path
        training.run(resume=resume)
        head = training.new_head()
        head.load_state_dict(load_file(training.head_path))
    else:
        raise ValueError("teacher.checkpoint: must name a file where teacher.fit is null")
    LOG.info("teacher: %s", path)
    teacher = load_orion_backbone(path, drop_path_rate=config.distill.drop_path, with_cp=False)
    for module in (teacher, head):
        if module is not None:
            module.to(accelerator.device).requires_grad_(False).eval()
    return teacher, head


@dataclass(frozen=True)
class TeacherTraining:
    """The training of a teacher on labels; later runs with the same settings use its files.

    Attributes:
        config: The whole run.
        spec: How the teacher is trained.
        accelerator: Device, precision and processes.
        data: The images.
        folder: Where checkpoints and logs go.
    """

    config: Config
    spec: FitTeacherConfig
    accelerator: Accelerator
    data: Data
    folder: Path

    @cached_property
    def path(self) -> Path:
        """File of the trained teacher; its name hashes everything that the training depends on."""
        config = self.config
        data = identity(plain(config), FREE)["data"]
        key = {
            "version": VERSION,
            "fit": plain(self.spec),
            "data": data | {"items": self.data.fingerprint(), "val_frames": None},
            "seed": config.seed,
            "precision": config.run.precision,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return Path(config.teacher.cache) / f"teacher-{digest}.safetensors"

    @property
    def head_path(self) -> Path:
        """File of its head."""
        return self.path.with_suffix(".head.safetensors")

    @property
    def manifest(self) -> Path:
        """Names both with their checksums; it is written last."""
        return self.path.with_suffix(".json")

    def new_head(self) -> DenseHead:
        """The head as it starts."""
        spec, classes = self.spec, len(self.data.train.dataset.classes)
        return DenseHead(spec.model.embed_dim, spec.head_dim, classes, spec.model.patch_size)

    def run(self, *, resume: bool) -> None:
        """Train and write both files, unless they are there."""
        if self.manifest.is_file():
            for path in (self.path, self.head_path):
                check_file(path, self.manifest, f"delete {self.manifest} to train it again")
            LOG.info("teacher of an earlier run with the same settings is used again")
            return
        if self.accelerator.is_main_process:
            require_writable(self.path.parent, "teacher.cache")
        seed_everything(self.config.seed)
        backbone = EVAViT(**plain(self.spec.model), with_cp=False)
        head = self.new_head()
        module = Supervised(backbone, head).to(self.accelerator.device)
        count = sum(p.numel() for p in backbone.parameters())
        LOG.info("training a teacher of %s parameters, kept in %s", f"{count:,}", self.path)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        Loop(self._job(module), self.accelerator).fit(resume=resume)
        self.accelerator.free_memory()
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            clear_partials(self.path.parent)
            with replacing(self.head_path) as partial:
                save_head(head, partial)
            save_backbone(backbone, self.path)
            write_manifest(self.manifest, {}, (self.path, self.head_path))
        self.accelerator.wait_for_everyone()

    def _job(self, module: Supervised) -> Job:
        config, spec, accelerator = self.config, self.spec, self.accelerator
        feed = view_feed(
            self.data.train.dataset,
            batch_size=spec.batch_size,
            device=accelerator.device,
            workers=config.data.workers,
            seed=config.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            gridmask=config.data.gridmask,
        )
        length = Length(
            epochs=spec.epochs,
            batches=len(feed),
            save_every=config.run.save_every,
            log_every=config.run.log_every,
        )
        held_out, limit = self.data.held_out, config.run.eval_images
        evaluate = Evaluator(accelerator, held_out, module.head, None, limit)
        optimizer = adamw(param_groups(module, spec.optim, spec.model.depth), spec.optim)
        return Job(
            title="teacher",
            folder=self.folder,
            logs=self.folder,
            module=module,
            feed=feed,
            length=length,
            optimizer=optimizer,
            set_lr=lr_setter(optimizer, spec.optim, length.total),
            clip=spec.optim.clip,
            meta={"stage": "teacher", "key": self.path.name},
            watch=EvaluateEpochs("teacher", evaluate, module.backbone),
        )


def save_head(head: DenseHead, path: Path) -> None:
    """Write the weights of a head as safetensors."""
    save_file({k: v.cpu().contiguous() for k, v in head.state_dict().items()}, path)
