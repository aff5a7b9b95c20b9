# SPDX-License-Identifier: Apache-2.0
"""What ORION's heads are told beside the features: cameras, motion of the car, ground truth.

See docs/use/orion.md. B streams of frames, V cameras, n objects or lanes of one frame. Coordinates
are ORION's lidar frame: x right, y forward, z up, in metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

POINTS, STEPS, CAN_BUS = 11, 6, 18
T = TypeVar("T", "Frame", "Objects", "Lanes")


def rigid_inverse(pose: Tensor) -> Tensor:
    """Inverses (..., 4, 4) of rotations with a shift, (..., 4, 4), without a general solver."""
    turn = pose[..., :3, :3].transpose(-1, -2)
    inverse = torch.zeros_like(pose)
    inverse[..., :3, :3] = turn
    inverse[..., :3, 3:] = -turn @ pose[..., :3, 3:]
    inverse[..., 3, 3] = 1
    return inverse


@dataclass(frozen=True)
class Frame:
    """Cameras and car of one moment, for each of B streams.

    Attributes:
        lidar2img: (B, V, 4, 4) fp32, lidar coordinates to pixels of the image that the backbone
            saw, times depth: intrinsics after resize and crop, times extrinsics.
        ego_pose: (B, 4, 4) fp32, lidar to global coordinates.
        ego_pose_inv: (B, 4, 4) fp32, its inverse; ``rigid_inverse`` in fp64, then rounded.
        timestamp: (B,) fp64, seconds.
        scene: (B,) int64; frames of one clip share a number that no other clip of the data has.
        command: (B,) fp32, the navigator's command, 0 to 5.
        can_bus: (B, 18) fp64: global position (3), orientation as a quaternion (4), velocity (3),
            acceleration (3), rotation rate (3), yaw in radians, yaw in degrees.
    """

    lidar2img: Tensor
    ego_pose: Tensor
    ego_pose_inv: Tensor
    timestamp: Tensor
    scene: Tensor
    command: Tensor
    can_bus: Tensor

    def __post_init__(self) -> None:
        """Raise if a shape or a dtype is another one.

        Raises:
            TypeError: A tensor has another dtype.
            ValueError: A tensor has another shape.
        """
        batch = self.timestamp.shape[:1]
        views = self.lidar2img.shape[1:2]
        _check(self, "lidar2img", (*batch, *views, 4, 4), torch.float32)
        _check(self, "ego_pose", (*batch, 4, 4), torch.float32)
        _check(self, "ego_pose_inv", (*batch, 4, 4), torch.float32)
        _check(self, "timestamp", (*batch,), torch.float64)
        _check(self, "scene", (*batch,), torch.int64)
        _check(self, "command", (*batch,), torch.float32)
        _check(self, "can_bus", (*batch, CAN_BUS), torch.float64)

    def to(self, device: torch.device | str) -> Frame:
        """The same frame on another device."""
        return _moved(self, device)

    def can_bus_row(self) -> Tensor:
        """(B, 19) fp64: the command, and the can bus without position and heading in degrees."""
        row = torch.cat((self.command[:, None].double(), self.can_bus), 1)
        row[:, [1, 2, 3, -1]] = 0
        return row


@dataclass(frozen=True)
class Objects:
    """The objects of one frame of one stream; n may be 0.

    Attributes:
        boxes: (n, 9) fp32: x, y, z of the **bottom's** centre, w, l, h, yaw, vx, vy.
        labels: (n,) int64, place in ``config.CLASSES``.
        lights: (n, 2) int64: state of a traffic light and whether it holds for this car; -1, -1 for
            other objects. A state of 3 or more is none of the three that the head knows.
        future: (n, 6, 2) fp32, the object's moves (dx, dy) in the next six steps of 0.5 s.
        future_valid: (n, 6) fp32, 1 for the steps of which the move is known, else 0.
    """

    boxes: Tensor
    labels: Tensor
    lights: Tensor
    future: Tensor
    future_valid: Tensor

    def __post_init__(self) -> None:
        """Raise if a shape or a dtype is another one.

        Raises:
            TypeError: A tensor has another dtype.
            ValueError: A tensor has another shape.
        """
        count = self.labels.shape[:1]
        _check(self, "boxes", (*count, 9), torch.float32)
        _check(self, "labels", (*count,), torch.int64)
        _check(self, "lights", (*count, 2), torch.int64)
        _check(self, "future", (*count, STEPS, 2), torch.float32)
        _check(self, "future_valid", (*count, STEPS), torch.float32)

    def to(self, device: torch.device | str) -> Objects:
        """The same objects on another device."""
        return _moved(self, device)

    @staticmethod
    def none() -> Objects:
        """A frame without objects."""
        whole = torch.zeros(0, dtype=torch.int64)
        steps = torch.zeros(0, STEPS)
        return Objects(
            torch.zeros(0, 9), whole, whole.new_zeros(0, 2), torch.zeros(0, STEPS, 2), steps
        )


@dataclass(frozen=True)
class Lanes:
    """The lines of the map around the car in one frame of one stream; n may be 0.

    Attributes:
        points: (n, 11, 3) fp32, points at equal distances along the line, inside the range of the
            heads; ORION's z is 0.
        labels: (n,) int64, place in ``config.LANE_CLASSES``.
    """

    points: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        """Raise if a shape or a dtype is another one.

        Raises:
            TypeError: A tensor has another dtype.
            ValueError: A tensor has another shape.
        """
        count = self.labels.shape[:1]
        _check(self, "points", (*count, POINTS, 3), torch.float32)
        _check(self, "labels", (*count,), torch.int64)

    def to(self, device: torch.device | str) -> Lanes:
        """The same lanes on another device."""
        return _moved(self, device)

    @staticmethod
    def none() -> Lanes:
        """A frame without lanes."""
        return Lanes(torch.zeros(0, POINTS, 3), torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True)
class Batch:
    """One frame of each of B streams, with its ground truth.

    Attributes:
        frame: Cameras and car.
        objects: B entries.
        lanes: B entries.
    """

    frame: Frame
    objects: Sequence[Objects]
    lanes: Sequence[Lanes]

    def __post_init__(self) -> None:
        """Raise if the lists do not have one entry for each stream.

        Raises:
            ValueError: They do not.
        """
        streams = self.frame.timestamp.shape[0]
        if not len(self.objects) == len(self.lanes) == streams:
            raise ValueError(
                f"Batch: objects and lanes must have {streams} entries, one for each stream of the "
                f"frame, got {len(self.objects)} and {len(self.lanes)}"
            )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        objects = [one.to(device) for one in self.objects]
        return Batch(self.frame.to(device), objects, [one.to(device) for one in self.lanes])


def _check(owner: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = getattr(owner, name)
    kind = type(owner).__name__
    if tensor.dtype != dtype:
        raise TypeError(f"{kind}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{kind}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")


def _moved(owner: T, device: torch.device | str) -> T:
    return replace(owner, **{f.name: getattr(owner, f.name).to(device) for f in fields(owner)})
