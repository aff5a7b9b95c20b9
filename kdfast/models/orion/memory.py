# SPDX-License-Identifier: Apache-2.0
"""What the heads remember of former frames. See docs/use/orion.md.

Between frames everything is in global coordinates and absolute time; ``at`` gives a frame's own
view of it, ``after`` adds what the frame found. Nothing in a memory has a gradient.

B streams, M entries, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from kdfast.models.orion.batch import CAN_BUS, POINTS, Frame
from kdfast.models.orion.config import DetectionConfig, MapConfig

LONGEST_GAP = 2.0  # seconds between two frames of one stream
CAN_BUS_LEN = 2  # former frames whose can bus is kept
M = TypeVar("M", "SceneMemory", "Memory")


@dataclass(frozen=True)
class Memory:
    """Queries of former frames, the newest first.

    Attributes:
        embedding: (B, M, D) what the decoder made of them.
        reference: (B, M, 3), or (B, M, 11, 3) for lanes, in metres.
        age: (B, M, 1) fp64: minus the time at which they were seen; in a frame's own view their
            age in seconds.
        pose: (B, M, 4, 4), from the lidar coordinates of their frame to global ones; in a frame's
            own view to the frame's.
        time: (B,) fp64, when the last frame was, -inf before the first.
        scene: (B,) int64, the last frame's scene.
    """

    embedding: Tensor
    reference: Tensor
    age: Tensor
    pose: Tensor
    time: Tensor
    scene: Tensor

    def keeps(self, frame: Frame) -> Tensor:
        """(B,) bool, whether a stream goes on: the same scene, less than 2 s later."""
        return ((frame.timestamp - self.time).abs() < LONGEST_GAP) & (frame.scene == self.scene)

    def at(self, frame: Frame, length: int) -> Memory:
        """The frame's own view of the newest ``length`` entries; zeros in a stream that restarts.

        Raises:
            ValueError: The frame has another number of streams.
        """
        streams = self.time.shape[0]
        if frame.timestamp.shape[0] != streams:
            raise ValueError(
                f"memory: frame must have the memory's {streams} streams, got "
                f"{frame.timestamp.shape[0]}; start a new memory (None) with another batch size"
            )
        keep = self.keeps(frame)
        return Memory(
            kept(self.embedding, keep, length),
            kept(moved(self.reference, frame.ego_pose_inv), keep, length),
            kept(self.age + frame.timestamp[:, None, None], keep, length),
            kept(frame.ego_pose_inv[:, None] @ self.pose, keep, length),
            frame.timestamp,
            frame.scene,
        )

    def after(self, frame: Frame, embedding: Tensor, reference: Tensor) -> Memory:
        """The memory for the next frame: this one's view and, in front of it, new entries.

        Args:
            frame: The frame whose view this is.
            embedding: (B, m, D) of the new entries.
            reference: (B, m, 3) or (B, m, 11, 3).
        """
        batch, count = embedding.shape[:2]
        here = torch.eye(4, device=embedding.device).expand(batch, count, 4, 4)
        now = self.age.new_zeros(batch, count, 1)
        return replace(
            self,
            embedding=torch.cat((embedding.detach(), self.embedding), 1),
            reference=moved(torch.cat((reference.detach(), self.reference), 1), frame.ego_pose),
            age=torch.cat((now, self.age), 1) - frame.timestamp[:, None, None],
            pose=frame.ego_pose[:, None] @ torch.cat((here, self.pose), 1),
        )


@dataclass(frozen=True)
class SceneMemory:
    """Tokens that sum up former frames, and the can bus of the last two.

    Attributes:
        query: (B, S, D), the newest first.
        age: (B, S, 1) fp64, as in ``Memory``.
        can_bus: (B, 2 or 3, 19) fp64, ``Frame.can_bus_row`` of former frames; columns 1 to 3 and
            the last are position and heading, global, in a frame's own view relative to it.
        frames: (B,) int64, frames since the stream started.
    """

    query: Tensor
    age: Tensor
    can_bus: Tensor
    frames: Tensor

    def at(self, frame: Frame, keep: Tensor, length: int) -> SceneMemory:
        """The frame's own view of the newest ``length`` tokens; zeros where ``keep`` is False."""
        rows = self.can_bus - self._filled() * _place(frame)
        return SceneMemory(
            kept(self.query, keep, length),
            kept(self.age + frame.timestamp[:, None, None], keep, length),
            kept(rows, keep, CAN_BUS_LEN),
            self.frames * keep,
        )

    def after(self, frame: Frame, query: Tensor) -> SceneMemory:
        """The memory for the next frame: this one's view and, in front, tokens (B, s, D)."""
        now = self.age.new_zeros(*query.shape[:2], 1)
        rows = torch.cat((frame.can_bus_row()[:, None], self.can_bus), 1)
        found = replace(self, can_bus=rows, frames=self.frames + 1)
        return SceneMemory(
            torch.cat((query.detach(), self.query), 1),
            torch.cat((now, self.age), 1) - frame.timestamp[:, None, None],
            rows + found._filled() * _place(frame),
            found.frames,
        )

    def _filled(self) -> Tensor:
        """(B, rows, 1), 1 for the rows that hold a frame."""
        row = torch.arange(self.can_bus.shape[1], device=self.frames.device)
        return (row < self.frames[:, None])[..., None].double()


@dataclass(frozen=True)
class HeadsMemory:
    """All that the heads remember; a training saves ``state()`` beside its weights.

    Attributes:
        detection: Objects.
        scene: Tokens and can bus, the detection head's too.
        map: Lanes.
    """

    detection: Memory
    scene: SceneMemory
    map: Memory

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name, for ``torch.save`` and ``from_state``."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return {
            f"{name}.{field.name}": getattr(part, field.name)
            for name, part in parts.items()
            for field in fields(part)
        }

    @staticmethod
    def from_state(state: Mapping[str, Tensor]) -> HeadsMemory:
        """What ``state`` was called on.

        Raises:
            ValueError: A name is missing or unknown.
        """
        wanted = {f"{name}.{f.name}" for name, kind in _PARTS.items() for f in fields(kind)}
        if wanted != set(state):
            raise ValueError(
                f"HeadsMemory: state must have the entries of state(), missing "
                f"{sorted(wanted - set(state))}, unknown {sorted(set(state) - wanted)}"
            )
        parts = {
            name: kind(**{f.name: state[f"{name}.{f.name}"] for f in fields(kind)})
            for name, kind in _PARTS.items()
        }
        return HeadsMemory(**parts)

    def to(self, device: torch.device | str) -> HeadsMemory:
        """The same memory on another device."""
        return self.from_state({name: x.to(device) for name, x in self.state().items()})


_PARTS: dict[str, type] = {"detection": Memory, "scene": SceneMemory, "map": Memory}


def no_objects(frame: Frame, config: DetectionConfig) -> Memory:
    """The detection head's memory before the first frame."""
    return _empty(frame, config.memory_len, config.dim, (3,))


def no_lanes(frame: Frame, config: MapConfig) -> Memory:
    """The map head's memory before the first frame."""
    return _empty(frame, config.memory_len, config.dim, (POINTS, 3))


def no_scenes(frame: Frame, config: DetectionConfig) -> SceneMemory:
    """The memory of scenes before the first frame."""
    batch, time = frame.timestamp.shape[0], frame.timestamp
    return SceneMemory(
        torch.zeros(batch, config.scene_memory_len, config.dim, device=time.device),
        time.new_zeros(batch, config.scene_memory_len, 1),
        time.new_zeros(batch, CAN_BUS_LEN, CAN_BUS + 1),
        torch.zeros_like(frame.scene),
    )


def _empty(frame: Frame, length: int, dim: int, point: tuple[int, ...]) -> Memory:
    batch, time = frame.timestamp.shape[0], frame.timestamp
    return Memory(
        torch.zeros(batch, length, dim, device=time.device),
        torch.zeros(batch, length, *point, device=time.device),
        time.new_zeros(batch, length, 1),
        torch.zeros(batch, length, 4, 4, device=time.device),
        torch.full_like(time, -torch.inf),
        torch.full_like(frame.scene, -1),
    )


def kept(x: Tensor, keep: Tensor, length: int) -> Tensor:
    """The first ``length`` entries of x (B, M, ...), zeros in the streams where ``keep`` is False.

    Not a product: what is forgotten may be inf or NaN.
    """
    flags = keep.view(-1, *(1,) * (x.dim() - 1))
    return torch.where(flags, x[:, :length], 0)


def moved(points: Tensor, pose: Tensor) -> Tensor:
    """Points (B, ..., 3) in the coordinates that poses (B, 4, 4) lead to."""
    whole = torch.cat((points, torch.ones_like(points[..., :1])), -1)
    pose = pose.view(-1, *(1,) * (points.dim() - 2), 4, 4)
    return (pose @ whole[..., None])[..., :3, 0]


def _place(frame: Frame) -> Tensor:
    """(B, 1, 19) fp64: position and heading of the car in the columns of the can bus's row."""
    place = frame.can_bus.new_zeros(frame.can_bus.shape[0], CAN_BUS + 1)
    place[:, 1:4], place[:, -1] = frame.can_bus[:, :3], frame.can_bus[:, -1]
    return place[:, None]
