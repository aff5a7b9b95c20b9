# SPDX-License-Identifier: Apache-2.0
"""The teacher of a run with the heads: ORION's checkpoint, or a small one that is trained here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdfast.configs.recovery import Config, HeadSizes
from kdfast.data.rng import NOISE, generator
from kdfast.models.checkpoint import load_orion_backbone
from kdfast.models.eva import EVAViT
from kdfast.models.orion import (
    Batch,
    DetectionConfig,
    HeadsConfig,
    MapConfig,
    OrionHeads,
    task_loss,
)
from kdfast.models.orion.checkpoint import load_orion_heads
from kdfast.recovery.fit_teacher import Parts, TeacherFit
from kdfast.recovery.orion.evaluate import FrameEvaluator
from kdfast.recovery.orion.feed import FrameData, Streams, frame_feed
from kdfast.trainer.logs import LOG


def heads_config(sizes: HeadSizes, channels: int, patch: int) -> HeadsConfig:
    """Small heads for features of ``channels`` at ``patch`` pixels."""
    common = {
        "in_channels": channels,
        "dim": sizes.dim,
        "layers": sizes.layers,
        "ffn": sizes.ffn,
        "vlm_queries": 8,
        "out_dims": sizes.dim,
    }
    topk = max(1, sizes.queries // 2)
    return HeadsConfig(
        DetectionConfig(
            **common,
            queries=sizes.queries,
            propagated=topk,
            topk=topk,
            memory_len=2 * topk,
            results=sizes.queries,
            scene_queries=4,
            scene_memory_len=8,
            aux_ffn=sizes.ffn,
            dn_groups=sizes.dn_groups,
        ),
        MapConfig(
            **common,
            lanes=4 * sizes.lanes,
            one2one=sizes.lanes,
            topk=sizes.lanes,
            memory_len=sizes.lanes,
            results=sizes.lanes,
            repeats=3,
        ),
        stride=patch,
        depths=16,
    )


class SupervisedFrames(nn.Module):
    """Backbone and heads under the task loss with denoising, in the form that the loop trains."""

    def __init__(self, backbone: EVAViT, heads: OrionHeads, streams: Streams, seed: int) -> None:
        super().__init__()
        self.backbone, self.heads, self.streams = backbone, heads, streams
        self.seed = seed

    def forward(self, images: Tensor, labels: Batch, epoch: int) -> dict[str, Tensor]:
        """Task loss of images (B * V, 3, H, W) of one frame of every stream."""
        # Of the frames and the epoch alone: a run that goes on draws the same.
        at = (int(labels.frame.scene.sum()), int(labels.frame.timestamp.sum() * 1000))
        draw = generator(NOISE, self.seed, epoch, *at).integers(2**63)
        noise = torch.Generator().manual_seed(int(draw))
        found = task_loss(
            self.heads, self.backbone(images), labels, self.streams.student, denoise=noise
        )
        self.streams.student = found.memory
        shown = {name: found.terms[name] for name in ("loss_cls", "loss_bbox", "loss_cls_lane")}
        # Processes share gradients of all parameters, also of those that a frame without objects,
        # or a loss without the language model, has no use for.
        unused = torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
        return {"total": found.total + 0 * unused, **shown}


def get_frame_teacher(
    config: Config, accelerator: Accelerator, data: FrameData, folder: Path, *, resume: bool
) -> tuple[EVAViT, OrionHeads]:
    """Teacher and heads, frozen and on the device of the run.

    Args:
        config: Names a checkpoint of ORION, or says how to train.
        accelerator: Device and processes.
        data: Used only if the teacher is trained here.
        folder: Checkpoints and logs of that training.
        resume: Continue an interrupted training from ``folder``.

    Raises:
        ValueError: The checkpoint does not fit, or holds no heads.
        Interrupted: A signal came during the training; its state was saved.
        NonFiniteLoss: The training broke.
    """
    spec = config.teacher.fit
    if config.teacher.checkpoint is not None:
        path = Path(config.teacher.checkpoint).expanduser()
        heads = load_orion_heads(path)
    elif spec is not None and spec.heads is not None:
        training = FrameTeacherTraining(config, spec, accelerator, folder, spec.heads, data)
        path, heads = training.path, training.run(resume=resume)
    else:
        raise ValueError("teacher.checkpoint: must name a file where teacher.fit has no heads")
    LOG.info("teacher: %s", path)
    teacher = load_orion_backbone(
        path, drop_path_rate=config.distill.drop_path, with_cp=False, **config.teacher.shape()
    )
    for module in (teacher, heads):
        module.to(accelerator.device).requires_grad_(False).eval()
    return teacher, heads


@dataclass(frozen=True)
class FrameTeacherTraining(TeacherFit[OrionHeads]):
    """The training of a small teacher with heads on frames.

    Attributes:
        sizes: Of the heads.
        data: The frames.
    """

    head_name = "heads"

    sizes: HeadSizes
    data: FrameData

    def facts(self) -> dict[str, Any]:
        """See ``TeacherFit``."""
        return {"frames": self.data.fingerprint()}

    def new_head(self) -> OrionHeads:
        """See ``TeacherFit``."""
        model = self.spec.model
        return OrionHeads(heads_config(self.sizes, model.embed_dim, model.patch_size))

    def parts(self, backbone: EVAViT, head: OrionHeads) -> Parts:
        """See ``TeacherFit``."""
        config, accelerator = self.config, self.accelerator
        streams = Streams(accelerator.device)
        feed = frame_feed(
            config,
            self.data.train.dataset,
            streams,
            accelerator.device,
            batch_size=self.spec.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        limit = config.run.eval_images
        evaluate = FrameEvaluator(accelerator, self.data.held_out, head, limit)
        return Parts(SupervisedFrames(backbone, head, streams, config.seed), feed, evaluate)
