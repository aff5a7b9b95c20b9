# SPDX-License-Identifier: Apache-2.0
"""The teacher: read from a checkpoint, or trained on labels once and kept for the next run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from kdfast.configs.recovery import Config
from kdfast.models.dense_head import DenseHead
from kdfast.models.eva import EVAViT
from kdfast.recovery.data import Data, view_feed
from kdfast.recovery.evaluate import Evaluator
from kdfast.recovery.fit_teacher import Parts, TeacherFit
from kdfast.resolve.backbone import load_eva
from kdfast.trainer.logs import LOG


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
        training = TeacherTraining(config, spec, accelerator, folder, data)
        path, head = training.path, training.run(resume=resume)
    else:
        raise ValueError("teacher.checkpoint: must name a file where teacher.fit is null")
    LOG.info("teacher: %s", path)
    teacher = load_eva(
        path,
        "teacher.checkpoint",
        drop_path_rate=config.distill.drop_path,
        with_cp=False,
        **config.teacher.shape(),
    )
    for module in (teacher, head):
        if module is not None:
            module.to(accelerator.device).requires_grad_(False).eval()
    return teacher, head


@dataclass(frozen=True)
class TeacherTraining(TeacherFit[DenseHead]):
    """The training of a teacher on labels of pixels.

    Attributes:
        data: The images.
    """

    head_name = "head"

    data: Data

    def facts(self) -> dict[str, Any]:
        """See ``TeacherFit``; the held-out images have no part in it."""
        return {"items": self.data.fingerprint(), "val_frames": None}

    def new_head(self) -> DenseHead:
        """See ``TeacherFit``."""
        spec, classes = self.spec, len(self.data.train.dataset.classes)
        return DenseHead(spec.model.embed_dim, spec.head_dim, classes, spec.model.patch_size)

    def parts(self, backbone: EVAViT, head: DenseHead) -> Parts:
        """See ``TeacherFit``."""
        config, accelerator = self.config, self.accelerator
        feed = view_feed(
            self.data.train.dataset,
            batch_size=self.spec.batch_size,
            device=accelerator.device,
            workers=config.data.workers,
            seed=config.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            gridmask=config.data.gridmask,
        )
        held_out, limit = self.data.held_out, config.run.eval_images
        evaluate = Evaluator(accelerator, held_out, head, None, limit)
        return Parts(Supervised(backbone, head), feed, evaluate)
