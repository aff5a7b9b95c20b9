# SPDX-License-Identifier: Apache-2.0
"""Small heads of ORION and a drive for them: a car with a ring of cameras, objects and lanes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdfast.models.orion import Batch, Frame, HeadsConfig, Lanes, Objects, OrionHeads

VIEWS, CHANNELS, GRID, STEP = 3, 12, (2, 4), 0.5


def small_heads_config(**overrides: Any) -> HeadsConfig:
    """Sizes that need milliseconds.

    Args:
        **overrides: Fields of both heads' configs to change.
    """
    from kdfast.models.orion import DetectionConfig, HeadsConfig, MapConfig

    common: dict[str, Any] = {
        "in_channels": CHANNELS,
        "dim": 16,
        "heads": 2,
        "layers": 2,
        "ffn": 24,
        "vlm_queries": 3,
        "out_dims": 10,
        **overrides,
    }
    objects = {"queries": 12, "propagated": 4, "memory_len": 10, "topk": 5, "results": 8}
    scene = {"scene_queries": 2, "scene_memory_len": 5, "aux_ffn": 20, "dn_groups": 3}
    lanes = {"lanes": 14, "one2one": 6, "repeats": 2, "memory_len": 8, "topk": 3, "results": 5}
    return HeadsConfig(
        DetectionConfig(**{**common, **objects, **scene}), MapConfig(**{**common, **lanes})
    )


def small_orion_heads(config: HeadsConfig | None = None, *, frozen: bool = True) -> OrionHeads:
    """Seeded heads whose biases are not zero.

    Args:
        config: Sizes; ``small_heads_config`` if None.
        frozen: Whether the parameters have no gradient.
    """
    from kdfast.models.orion import OrionHeads

    torch.manual_seed(2)
    heads = OrionHeads(small_heads_config() if config is None else config)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return heads.requires_grad_(not frozen).eval()


def features(batch: int = 2, *, seed: int = 0) -> Tensor:
    """(B, V, C, h, w) for ``small_orion_heads``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, VIEWS, CHANNELS, *GRID, generator=generator)


def frame(step: int = 0, *, streams: int = 2) -> Frame:
    """The moment ``step`` of a drive; every stream drives elsewhere.

    Args:
        step: Half seconds since the start.
        streams: B.
    """
    from kdfast.models.orion import Frame, rigid_inverse

    poses, rows = [], []
    for stream in range(streams):
        yaw = 0.4 * stream + 0.05 * step
        pose = torch.eye(4, dtype=torch.float64)
        pose[:2, :2] = torch.tensor(_turn(yaw), dtype=torch.float64)
        pose[:2, 3] = torch.tensor([20.0 + 3 * stream, -7.0 + 2.5 * step])
        poses.append(pose)
        degrees = math.degrees(yaw)
        rows.append(
            [*pose[:3, 3].tolist(), 1, 0, 0, 0, 5, 0, 0, 0.1, 0, 9.8, 0, 0, 0.1, yaw, degrees]
        )
    pose = torch.stack(poses)
    return Frame(
        lidar2img=_cameras().expand(streams, -1, -1, -1),
        ego_pose=pose.float(),
        ego_pose_inv=rigid_inverse(pose).float(),
        timestamp=100.0 + STEP * step + 50 * torch.arange(streams, dtype=torch.float64),
        scene=torch.arange(streams),
        command=torch.arange(streams).float() % 6,
        can_bus=torch.tensor(rows, dtype=torch.float64),
    )


def batch(step: int = 0, *, streams: int = 2, seed: int = 0) -> Batch:
    """``frame`` with ground truth; stream i has i + 2 objects, the last a traffic light."""
    from kdfast.models.orion import Batch

    generator = torch.Generator().manual_seed(seed)
    objects = [_objects(i + 2, generator) for i in range(streams)]
    return Batch(frame(step, streams=streams), objects, [_lanes(i + 1) for i in range(streams)])


def restarted(given: Frame, stream: int) -> Frame:
    """The frame with another scene in one stream."""
    scene = given.scene.clone()
    scene[stream] += 1000
    return replace(given, scene=scene)


def _objects(count: int, generator: torch.Generator) -> Objects:
    from kdfast.models.orion import Objects

    boxes = torch.rand(count, 9, generator=generator)
    boxes[:, :2] = 60 * boxes[:, :2] - 30
    boxes[:, 3:6] += 1
    lights = torch.full((count, 2), -1)
    lights[-1] = torch.tensor([1, 1])
    labels = torch.arange(count) % 5
    labels[-1] = 6
    future = torch.randn(count, 6, 2, generator=generator)
    valid = torch.ones(count, 6)
    valid[0, 3:] = 0
    return Objects(boxes, labels, lights, future, valid)


def _lanes(count: int) -> Lanes:
    from kdfast.models.orion import Lanes

    points = torch.zeros(count, 11, 3)
    points[..., 0] = 4.0 * torch.arange(count)[:, None] - 2
    points[..., 1] = torch.linspace(-20, 30, 11)
    return Lanes(points, torch.arange(count) % 4)


def _turn(yaw: float) -> list[list[float]]:
    return [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]


def _cameras() -> Tensor:
    """(1, V, 4, 4) of cameras that look ahead, to the left and to the right, 1.6 m up."""
    h, w = GRID
    focal = torch.eye(4)
    focal[0, 0] = focal[1, 1] = 8.0 * w
    focal[:2, 2] = torch.tensor([8.0 * w, 8.0 * h])
    cameras = []
    for yaw in (0.0, 1.2, -1.2):
        # Lidar's x right, y forward, z up to the camera's x right, y down, z forward.
        turn = torch.eye(3)
        turn[:2, :2] = torch.tensor(_turn(-yaw))
        axes = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ turn
        pose = torch.eye(4)
        pose[:3, :3], pose[:3, 3] = axes, axes @ torch.tensor([0.0, -0.5, -1.6])
        cameras.append(focal @ pose)
    return torch.stack(cameras)[None]
