# SPDX-License-Identifier: Apache-2.0
"""Both heads as one module, and their loss on features of a backbone. See docs/use/orion.md.

B streams, V cameras, C channels, (h, w) grid of patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdfast.models.orion.batch import POINTS, Batch, Frame
from kdfast.models.orion.config import CLASSES, POSITION_RANGE, HeadsConfig
from kdfast.models.orion.denoise import Noised, copies, noised_boxes
from kdfast.models.orion.detection import DetectionHead, DetectionOutput
from kdfast.models.orion.encodings import (
    FREQUENCIES,
    Encodings,
    MotionNorm,
    depth_samples,
    ray_logits,
    time_layers,
)
from kdfast.models.orion.lanes import MapHead, MapOutput
from kdfast.models.orion.losses import detection_losses, map_losses
from kdfast.models.orion.memory import HeadsMemory, no_lanes, no_objects, no_scenes


@dataclass(frozen=True)
class HeadsOutput:
    """Results of both heads.

    Attributes:
        detection: Objects.
        map: Lanes.
    """

    detection: DetectionOutput
    map: MapOutput

    @property
    def vlm_tokens(self) -> Tensor | None:
        """What the language model gets, (B, 529, 4096) with ORION's sizes; None if not made."""
        parts = self.detection.tokens, self.map.tokens
        return None if parts[0] is None or parts[1] is None else torch.cat((parts[0], parts[1]), 1)


@dataclass(frozen=True)
class TaskLoss:
    """A batch's loss through the heads.

    Attributes:
        total: The sum of all terms, a scalar and the only one with a gradient.
        terms: Every term by ORION's name, detached.
        memory: What the heads remember, for the next batch.
        output: What the heads found.
    """

    total: Tensor
    terms: dict[str, Tensor]
    memory: HeadsMemory
    output: HeadsOutput


class OrionHeads(nn.Module):
    """ORION's detection head and map head, with the encodings that they share.

    The names of the parameters are those of ORION's whole model, each once. Nothing in it differs
    between training and eval mode.

    Args:
        config: Sizes; those of ORION's stage 3 if None.
    """

    position_range: Tensor
    coords_d: Tensor

    def __init__(self, config: HeadsConfig | None = None) -> None:
        super().__init__()
        self.config = HeadsConfig() if config is None else config
        dim, depths = self.config.detection.dim, self.config.depths
        values = 2 * len(FREQUENCIES) * 3 * POINTS
        self.query_pos = nn.Sequential(nn.Linear(values, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.time_embedding = time_layers(dim)
        self.ego_pose_pe = MotionNorm(dim)
        self.position_encoder = nn.Sequential(
            nn.Linear(3 * depths, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)
        )
        self.register_buffer("position_range", torch.tensor(POSITION_RANGE))
        self.register_buffer("coords_d", depth_samples(depths))
        self.pts_bbox_head = DetectionHead(self.config.detection)
        self.map_head = MapHead(self.config.map)

    def encodings(self) -> Encodings:
        """What both heads share beside the rays."""
        return Encodings(self.query_pos, self.time_embedding, self.ego_pose_pe)

    def rays(self, lidar2img: Tensor, grid: tuple[int, int]) -> Tensor:
        """Positions (B, V * h * w, D) of the patches of a grid, from the cameras (B, V, 4, 4)."""
        stride, depths = self.config.stride, self.coords_d
        logits = ray_logits(lidar2img, grid, stride, depths, self.position_range)
        out: Tensor = self.position_encoder(logits)
        return out

    def forward(
        self,
        features: Tensor,
        frame: Frame,
        memory: HeadsMemory | None = None,
        *,
        noised: Noised | None = None,
        tokens: bool = True,
    ) -> tuple[HeadsOutput, HeadsMemory]:
        """Results of one frame of each stream, and the memory for the next one.

        Args:
            features: (B, V, C, h, w), or (B * V, C, h, w) as a backbone gives them; the heads
                compute in fp32 whatever their dtype.
            frame: Cameras and car.
            memory: What the frames before left behind; None at the start.
            noised: Copies of the ground truth, for denoising.
            tokens: Whether to make tokens for the language model.

        Raises:
            ValueError: Features do not fit the frame or the heads, or the memory has another number
                of streams.
        """
        pixels, grid = self._pixels(features, frame)
        if memory is None:
            memory = self.empty_memory(frame)
        # As in ORION, whose heads run outside of autocast: coordinates need all of fp32.
        with torch.autocast(pixels.device.type, enabled=False):
            rays, encodings = self.rays(frame.lidar2img, grid), self.encodings()
            objects, found, scene = self.pts_bbox_head(
                pixels,
                rays,
                frame,
                encodings,
                memory.detection,
                memory.scene,
                noised=noised,
                tokens=tokens,
            )
            lanes, lines = self.map_head(pixels, rays, frame, encodings, memory.map, tokens=tokens)
        return HeadsOutput(objects, lanes), HeadsMemory(found, scene, lines)

    def empty_memory(self, frame: Frame) -> HeadsMemory:
        """The memory before the first frame of all streams."""
        config = self.config
        scenes = no_scenes(frame, config.detection)
        return HeadsMemory(no_objects(frame, config.detection), scenes, no_lanes(frame, config.map))

    def noise(self, batch: Batch, generator: torch.Generator) -> Noised | None:
        """Noised copies of a batch's boxes; None if it has none.

        Args:
            batch: Frame and ground truth.
            generator: On the CPU; its next numbers decide.
        """
        config = self.config.detection
        draws = torch.rand(copies(batch.objects, config.dn_groups), 3, generator=generator)
        bounds = self.pts_bbox_head.pc_range
        return noised_boxes(
            batch.objects,
            draws.to(bounds.device),
            groups=config.dn_groups,
            classes=len(CLASSES),
            bounds=bounds,
        )

    def _pixels(self, features: Tensor, frame: Frame) -> tuple[Tensor, tuple[int, int]]:
        """Features as (B, V * h * w, C) fp32, and the grid."""
        batch, views = frame.lidar2img.shape[:2]
        channels = self.config.detection.in_channels
        images = features.flatten(0, -4) if features.dim() > 3 else features
        if images.dim() != 4 or images.shape[:2] != (batch * views, channels):
            raise ValueError(
                f"OrionHeads: features must be ({batch}, {views}, {channels}, h, w) or "
                f"({batch * views}, {channels}, h, w), got {tuple(features.shape)}"
            )
        grid = (images.shape[2], images.shape[3])
        return images.float().movedim(1, -1).reshape(batch, -1, channels), grid


def task_loss(
    heads: OrionHeads,
    features: Tensor,
    batch: Batch,
    memory: HeadsMemory | None = None,
    *,
    denoise: torch.Generator | None = None,
    tokens: bool = False,
) -> TaskLoss:
    """ORION's detection and map loss of a frame, through heads that are usually frozen.

    Args:
        heads: Both heads.
        features: (B, V, C, h, w) or (B * V, C, h, w); the gradient goes to them, and to the heads
            where these are not frozen.
        batch: Frame and ground truth, on the device of the features.
        memory: ``TaskLoss.memory`` of the frame before; None at the start.
        denoise: Draws the noise of denoising queries, on the CPU; None: there are none. ORION
            trains its heads with them; for frozen heads they add noise to a loss that needs none.
        tokens: Whether ``output.vlm_tokens`` is made.

    Raises:
        ValueError: See ``OrionHeads.forward``.
    """
    noised = None if denoise is None else heads.noise(batch, denoise)
    output, remembered = heads(features, batch.frame, memory, noised=noised, tokens=tokens)
    detection, config = heads.pts_bbox_head, heads.config.map
    losses = detection_losses(
        output.detection,
        batch.objects,
        noised,
        code_weights=detection.code_weights,
        match_costs=detection.match_costs,
    ) | map_losses(
        output.map,
        batch.lanes,
        repeats=config.repeats,
        one2many_weight=config.one2many_weight,
    )
    terms = {name: loss.detach() for name, loss in losses.items()}
    return TaskLoss(torch.stack(list(losses.values())).sum(), terms, remembered, output)
