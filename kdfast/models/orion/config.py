# SPDX-License-Identifier: Apache-2.0
"""Sizes of ORION's detection head and map head; the defaults are those of its stage 3."""

from __future__ import annotations

from dataclasses import dataclass, field

CLASSES = (
    "car",
    "van",
    "truck",
    "bicycle",
    "traffic_sign",
    "traffic_cone",
    "traffic_light",
    "pedestrian",
    "others",
)
LANE_CLASSES = ("Broken", "Solid", "SolidSolid", "Center", "TrafficLight", "StopSign")
# Lowest and highest x, y, z in metres: what the heads detect, and what a camera's rays are measured
# in (boxes outside of the second are dropped).
PC_RANGE = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
POSITION_RANGE = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)


@dataclass(frozen=True)
class HeadConfig:
    """What both heads have.

    Attributes:
        in_channels: Channels of the feature map.
        dim: Width of the queries; a multiple of ``heads``, even.
        heads: Attention heads.
        layers: Layers of the decoder.
        ffn: Hidden width of the decoder's feed-forward layers.
        vlm_queries: Queries whose results are tokens for the language model.
        out_dims: Width of those tokens.
        memory_len: Queries of former frames that are attended.
        topk: Queries of a frame that the memory keeps.
        results: Boxes or lanes that decoding gives at most.
    """

    in_channels: int = 1024
    dim: int = 256
    heads: int = 8
    layers: int = 6
    ffn: int = 2048
    vlm_queries: int = 256
    out_dims: int = 4096
    memory_len: int = 600
    topk: int = 300
    results: int = 300

    def __post_init__(self) -> None:
        """Raise if a size does not fit another one.

        Raises:
            ValueError: The message names the sizes.
        """
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(
                f"{type(self).__name__}: dim must be even and a multiple of heads, got {self.dim} "
                f"and {self.heads}"
            )


@dataclass(frozen=True)
class DetectionConfig(HeadConfig):
    """The detection head, ``pts_bbox_head``.

    Attributes:
        queries: Learned queries.
        propagated: Entries of the memory that become queries.
        scene_queries: Tokens that sum up a frame for the frames after it.
        scene_memory_len: Such tokens of former frames that are attended.
        aux_ffn: Hidden width of the feed-forward layers beside the decoder.
        dn_groups: Noised copies of every ground-truth box, in training with denoising.
    """

    queries: int = 600
    propagated: int = 300
    scene_queries: int = 16
    scene_memory_len: int = 256
    aux_ffn: int = 512
    dn_groups: int = 10

    def __post_init__(self) -> None:
        """Raise if a size does not fit another one.

        Raises:
            ValueError: The message names the sizes.
        """
        super().__post_init__()
        if self.memory_len != 2 * self.topk or self.propagated > self.memory_len:
            raise ValueError(
                "DetectionConfig: memory_len must be twice topk (the token of the can bus reads "
                f"two frames) and at least propagated, got {self.memory_len}, {self.topk} and "
                f"{self.propagated}"
            )
        _check_topk(self, self.queries + self.propagated)


@dataclass(frozen=True)
class MapConfig(HeadConfig):
    """The map head, ``map_head``.

    Attributes:
        lanes: Learned queries of lanes.
        one2one: The first of them, of which each is matched with one lane; the results come from
            them. The others are an aid to training.
        repeats: Queries of the others that are matched with each lane.
        one2many_weight: Weight of their losses.
    """

    results: int = 50
    lanes: int = 1800
    one2one: int = 300
    repeats: int = 5
    one2many_weight: float = 1.0

    def __post_init__(self) -> None:
        """Raise if a size does not fit another one.

        Raises:
            ValueError: The message names the sizes.
        """
        super().__post_init__()
        if not 0 < self.one2one <= self.lanes:
            raise ValueError(
                f"MapConfig: one2one must be in [1, lanes = {self.lanes}], got {self.one2one}"
            )
        _check_topk(self, self.one2one)


@dataclass(frozen=True)
class HeadsConfig:
    """Both heads and what they share.

    Attributes:
        detection: The detection head.
        map: The map head.
        stride: Pixels per side of a feature's patch.
        depths: Depths at which the ray of a patch is sampled.
    """

    detection: DetectionConfig = field(default_factory=DetectionConfig)
    map: MapConfig = field(default_factory=MapConfig)
    stride: int = 16
    depths: int = 64

    def __post_init__(self) -> None:
        """Raise if the heads do not fit each other.

        Raises:
            ValueError: They differ in a size that they share.
        """
        for name in ("in_channels", "dim"):
            pair = getattr(self.detection, name), getattr(self.map, name)
            if pair[0] != pair[1]:
                raise ValueError(f"HeadsConfig: {name} must be the same in both heads, got {pair}")


def _check_topk(config: HeadConfig, available: int) -> None:
    if not 0 < config.topk <= available:
        raise ValueError(
            f"{type(config).__name__}: topk must be in [1, {available}], the queries of a frame, "
            f"got {config.topk}"
        )
