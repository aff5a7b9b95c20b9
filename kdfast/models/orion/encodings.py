# SPDX-License-Identifier: Apache-2.0
"""How ORION's heads turn points, times, poses and camera rays into vectors.

B streams, V cameras, M entries, D width of the heads, (h, w) grid of patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.models.orion.batch import POINTS

FREQUENCIES = (1, 2, 4, 8, 16, 32)
POSE_VALUES = 13  # age in seconds and the first three rows of a pose
NEAREST, FARTHEST = 1.0, 61.2  # depth of a ray's samples, in metres
LOGIT_EPS = 1e-5


def inverse_sigmoid(x: Tensor) -> Tensor:
    """The logit of x, clamped to [0, 1] and to what 1e-5 away from both ends gives."""
    x = x.clamp(0, 1)
    return (x.clamp(min=LOGIT_EPS) / (1 - x).clamp(min=LOGIT_EPS)).log()


def normalised(points: Tensor, bounds: Tensor) -> Tensor:
    """Points (..., 3) in metres as shares of ``bounds``, (6,): lowest, then highest x, y, z."""
    return (points - bounds[:3]) / (bounds[3:] - bounds[:3])


def in_metres(shares: Tensor, bounds: Tensor) -> Tensor:
    """What ``normalised`` undoes."""
    return shares * (bounds[3:] - bounds[:3]) + bounds[:3]


def waves(values: Tensor) -> Tensor:
    """(..., 12 n) of (..., n): sines, then cosines of all values, at each of six frequencies."""
    parts = [wave(f * values) for f in FREQUENCIES for wave in (torch.sin, torch.cos)]
    return torch.cat(parts, -1)


def time_waves(seconds: Tensor, dim: int) -> Tensor:
    """(..., dim) fp32 of (..., 1): sine and cosine in turn, of falling frequency.

    Times are fp64, and so is the angle.
    """
    pair = torch.arange(dim, dtype=seconds.dtype, device=seconds.device) // 2
    angle = 2 * math.pi * seconds / 10000 ** (2 * pair / dim)
    return torch.stack((angle[..., ::2].sin(), angle[..., 1::2].cos()), -1).flatten(-2).float()


class MotionNorm(nn.Module):
    """LayerNorm whose gain and offset follow from an entry's age and pose, ``ego_pose_pe``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(2 * len(FREQUENCIES) * POSE_VALUES, dim), nn.ReLU())
        self.gamma = nn.Linear(dim, dim)
        self.beta = nn.Linear(dim, dim)

    def forward(self, x: Tensor, age: Tensor, pose: Tensor) -> Tensor:
        """(B, M, D) of the same, ages (B, M, 1) fp64 and poses (B, M, 4, 4) fp32."""
        motion = torch.cat((age.float(), pose[..., :3, :].flatten(-2)), -1)
        reduced = self.reduce(waves(motion))
        out: Tensor = self.gamma(reduced) * F.layer_norm(x, x.shape[-1:]) + self.beta(reduced)
        return out


@dataclass(frozen=True)
class Encodings:
    """The encodings that both heads share; ``OrionHeads`` owns their modules.

    Attributes:
        query_pos: 396 waves of 33 coordinates to D.
        time_embedding: D waves of a time to D.
        ego_pose_pe: The norm that knows an entry's motion.
    """

    query_pos: nn.Module
    time_embedding: nn.Module
    ego_pose_pe: nn.Module

    def points(self, shares: Tensor) -> Tensor:
        """(..., D) of points as shares of the range: (..., 3), one point, or (..., 11, 3)."""
        if shares.dim() == 3:
            shares = shares[..., None, :].expand(-1, -1, POINTS, -1)
        out: Tensor = self.query_pos(waves(shares.flatten(-2)))
        return out

    def time(self, seconds: Tensor) -> Tensor:
        """(..., D) of ages (..., 1) fp64."""
        return timed(self.time_embedding, seconds)

    def now(self) -> Tensor:
        """(D,), the encoding of age 0."""
        weight = cast(nn.Linear, cast(nn.Sequential, self.time_embedding)[0]).weight
        return self.time(torch.zeros(1, dtype=torch.float64, device=weight.device))

    def remembered(self, shares: Tensor, age: Tensor, pose: Tensor) -> Tensor:
        """(B, M, D) of entries of the memory: where they are, how old, and the car's motion."""
        out: Tensor = self.ego_pose_pe(self.points(shares), age, pose)
        return out + self.time(age)


def timed(embedding: nn.Module, seconds: Tensor) -> Tensor:
    """What ``time_layers`` made of times (..., 1) fp64."""
    linear = cast(nn.Linear, cast(nn.Sequential, embedding)[0])
    out: Tensor = embedding(time_waves(seconds, linear.in_features))
    return out


def time_layers(dim: int) -> nn.Sequential:
    """Layers of an encoding of times."""
    return nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))


def depth_samples(count: int) -> Tensor:
    """(count,) fp32 depths in metres, their distances growing linearly: ORION's ``coords_d``."""
    index = torch.arange(count, dtype=torch.float32)
    return NEAREST + (FARTHEST - NEAREST) / (count * (count + 1)) * index * (index + 1)


def ray_logits(
    lidar2img: Tensor, grid: tuple[int, int], stride: int, depths: Tensor, bounds: Tensor
) -> Tensor:
    """Where the ray through each patch's centre is, at each depth.

    Args:
        lidar2img: (B, V, 4, 4) fp32.
        grid: (h, w).
        stride: Pixels per side of a patch.
        depths: (K,) in metres.
        bounds: (6,), what the points are shares of.

    Returns:
        (B, V * h * w, 3 K): logits of the shares, by camera, row and column.
    """
    device = lidar2img.device
    y, x = (stride * torch.arange(side, device=device) + stride / 2 for side in grid)
    y, x, d = torch.meshgrid(y, x, depths, indexing="ij")
    pixels = torch.stack((x * d, y * d, d, torch.ones_like(d)), -1).view(-1, 4)
    points = pixels @ torch.linalg.inv(lidar2img).transpose(-1, -2)
    shares = normalised(points[..., :3], bounds)
    return inverse_sigmoid(shares).view(lidar2img.shape[0], -1, 3 * depths.shape[0])
