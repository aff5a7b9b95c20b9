# SPDX-License-Identifier: Apache-2.0
"""The teacher of a run with the heads: ORION's checkpoint, or a small one that is trained here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdfast.configs import plain
from kdfast.configs.recovery import Config, FitTeacherConfig, HeadSizes
from kdfast.machine.disk import require_writable
from kdfast.machine.files import clear_partials, replacing
from kdfast.models.checkpoint import load_orion_backbone, save_backbone
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
from kdfast.recovery.evaluate import EvaluateEpochs
from kdfast.recovery.free import FREE
from kdfast.recovery.optim import adamw, lr_setter, param_groups
from kdfast.recovery.orion.evaluate import FrameEvaluator
from kdfast.recovery.orion.feed import FrameData, Streams, frame_feed
from kdfast.trainer.commits import check_file, write_manifest
from kdfast.trainer.job import Job, Length
from kdfast.trainer.logs import LOG
from kdfast.trainer.loop import Loop
from kdfast.trainer.state import identity, seed_everything

# Part of the key of a kept teacher: to be raised when the same config trains another one.
VERSION = 1


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
        # Noise that depends on the frame alone: a run that goes on draws the same.
        at = int(labels.frame.timestamp.sum() * 1000) + 31 * int(labels.frame.scene.sum())
        noise = torch.Generator().manual_seed((self.seed + 7919 * epoch + at) % 2**63)
        found = task_loss(
            self.heads, self.backbone(images), labels, self.streams.student, denoise=noise
        )
        self.streams.student = found.memory
        shown = {name: found.terms[name] for name in ("loss_cls", "loss_bbox", "loss_cls_lane")}
        return {"total": found.total, **shown}


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
        training = FrameTeacherTraining(config, spec, spec.heads, accelerator, data, folder)
        path = training.path
        training.run(resume=resume)
        heads = training.new_heads()
        heads.load_state_dict(load_file(training.heads_path))
    else:
        raise ValueError("teacher.checkpoint: must name a file where teacher.fit has no heads")
    LOG.info("teacher: %s", path)
    teacher = load_orion_backbone(path, drop_path_rate=config.distill.drop_path, with_cp=False)
    for module in (teacher, heads):
        module.to(accelerator.device).requires_grad_(False).eval()
    return teacher, heads


@dataclass(frozen=True)
class FrameTeacherTraining:
    """The training of a small teacher with heads; later runs with the same settings use its files.

    Attributes:
        config: The whole run.
        spec: How the teacher is trained.
        sizes: Of the heads.
        accelerator: Device, precision and processes.
        data: The frames.
        folder: Where checkpoints and logs go.
    """

    config: Config
    spec: FitTeacherConfig
    sizes: HeadSizes
    accelerator: Accelerator
    data: FrameData
    folder: Path

    @cached_property
    def path(self) -> Path:
        """File of the trained backbone; its name hashes everything that the training depends on."""
        config = self.config
        data = identity(plain(config), FREE)["data"]
        key = {
            "version": VERSION,
            "fit": plain(self.spec),
            "data": data | {"frames": self.data.fingerprint()},
            "seed": config.seed,
            "precision": config.run.precision,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return Path(config.teacher.cache) / f"teacher-{digest}.safetensors"

    @property
    def heads_path(self) -> Path:
        """File of its heads."""
        return self.path.with_suffix(".heads.safetensors")

    @property
    def manifest(self) -> Path:
        """Names both with their checksums; it is written last."""
        return self.path.with_suffix(".json")

    def new_heads(self) -> OrionHeads:
        """The heads as they start."""
        model = self.spec.model
        return OrionHeads(heads_config(self.sizes, model.embed_dim, model.patch_size))

    def run(self, *, resume: bool) -> None:
        """Train and write both files, unless they are there."""
        if self.manifest.is_file():
            for path in (self.path, self.heads_path):
                check_file(path, self.manifest, f"delete {self.manifest} to train it again")
            LOG.info("teacher of an earlier run with the same settings is used again")
            return
        if self.accelerator.is_main_process:
            require_writable(self.path.parent, "teacher.cache")
        seed_everything(self.config.seed)
        backbone, heads = EVAViT(**plain(self.spec.model), with_cp=False), self.new_heads()
        streams = Streams(self.accelerator.device)
        module = SupervisedFrames(backbone, heads, streams, self.config.seed)
        module.to(self.accelerator.device)
        count = sum(p.numel() for p in module.parameters())
        LOG.info("training a teacher of %s parameters, kept in %s", f"{count:,}", self.path)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        Loop(self._job(module, streams), self.accelerator).fit(resume=resume)
        self.accelerator.free_memory()
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            clear_partials(self.path.parent)
            with replacing(self.heads_path) as partial:
                save_heads(heads, partial)
            save_backbone(backbone, self.path)
            write_manifest(self.manifest, {}, (self.path, self.heads_path))
        self.accelerator.wait_for_everyone()

    def _job(self, module: SupervisedFrames, streams: Streams) -> Job:
        config, spec, accelerator = self.config, self.spec, self.accelerator
        feed = frame_feed(
            config,
            self.data.train.dataset,
            streams,
            accelerator.device,
            batch_size=spec.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        length = Length(
            epochs=spec.epochs,
            batches=len(feed),
            save_every=config.run.save_every,
            log_every=config.run.log_every,
        )
        evaluate = FrameEvaluator(
            accelerator, self.data.held_out, module.heads, config.run.eval_images
        )
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


def save_heads(heads: OrionHeads, path: Path) -> None:
    """Write the weights of the heads as safetensors, with their sizes."""
    state = {name: x.cpu().contiguous() for name, x in heads.state_dict().items()}
    save_file(state, path, metadata={"heads": json.dumps(asdict(heads.config))})
