# SPDX-License-Identifier: Apache-2.0
"""What docs/scale.md computes: three trainings, and the assumptions that no machine here proves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from kdfast.configs import ChainConfig, Config
from kdfast.configs.chain import ChainDataConfig
from kdfast.configs.orion50 import orion50
from kdfast.data.orion.names import CAMERAS, TRAIN_FRAMES
from kdfast.machine.gpus import GPUS

IMAGENET = 1_281_167
TRAIN_VIEWS = TRAIN_FRAMES * len(CAMERAS)
BILLION = 1_000_000_000
CLASSES = 1000
H100 = GPUS["h100"]
# Classes that a small teacher cache keeps.
TOP_K = 16


@dataclass(frozen=True)
class Setting:
    """One training.

    Attributes:
        key: Its name in the files.
        title: Its name for readers.
        pictures: Training pictures of an epoch.
        epochs: Numbers of epochs to compute; the first is the one of the tables.
        limit: Pictures of all GPUs in a step that the recipe still bears.
        work: Which counted step it takes.
        data: Which measured pipeline makes its pictures.
    """

    key: str
    title: str
    pictures: int
    epochs: tuple[int, ...]
    limit: int
    work: str
    data: str


def vit_l_to_s() -> ChainConfig:
    """ViT-L -> ViT-S on ImageNet-1k: the second link of a chain, in bf16."""
    return ChainConfig(
        name="vit_l_to_s",
        chain=("vit_large_patch16_224", "vit_small_patch16_224"),
        epochs=300,
        precision="bf16",
        data=ChainDataConfig(kind="imagefolder", root="imagenet", size=224),
    )


def configs() -> dict[str, Config | ChainConfig]:
    """The configs whose steps are counted."""
    return {"orion50": orion50(), "vit_l_to_s": vit_l_to_s()}


def settings(chosen: Assumptions) -> list[Setting]:
    """The trainings of the page."""
    return [
        Setting(
            "orion50",
            "orion50, Bench2Drive",
            TRAIN_VIEWS,
            (orion50().run.epochs,),
            chosen.orion_limit,
            "orion50",
            "bench2drive",
        ),
        Setting(
            "imagenet",
            "ViT-L -> ViT-S, ImageNet-1k",
            IMAGENET,
            (chosen.imagenet_epochs,),
            chosen.imagenet_limit,
            "vit_l_to_s",
            "imagenet",
        ),
        Setting(
            "billion",
            "ViT-L -> ViT-S, 1 billion pictures",
            BILLION,
            (1, 3, 10),
            chosen.billion_limit,
            "vit_l_to_s",
            "imagenet",
        ),
    ]


# Assumptions that are a part of something, and those that may be nothing.
SHARES = ("share", "hbm_share", "link_share", "overlap")
MAYBE_ZERO = ("hop_us", "overlap", "launch_ms")


def _says(default: Any, words: str) -> Any:
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Assumptions:
    """What is taken as given; a pair is the slow and the fast case."""

    gpus: tuple[int, ...] = _says((1, 8, 64, 512), "numbers of GPUs")
    node: int = _says(8, "GPUs of a node")
    tflops: float = _says(float(H100.half), "TFLOP/s of dense bf16 products, H100 SXM data sheet")
    share: tuple[float, float] = _says((0.25, 0.45), "share of them that a training reaches")
    hbm: float = _says(3350.0, "GB/s of a GPU's memory, H100 SXM data sheet")
    hbm_share: tuple[float, float] = _says((0.6, 0.85), "share of it that the optimizer reaches")
    nvlink: float = _says(450.0, "GB/s a direction of a GPU's NVLink, data sheet")
    network: float = _says(50.0, "GB/s a direction of a GPU's InfiniBand, NDR")
    link_share: tuple[float, float] = _says((0.5, 0.8), "share of links that a ring reaches")
    hop_us: tuple[float, float] = _says((20.0, 10.0), "microseconds of a message between nodes")
    overlap: tuple[float, float] = _says((0.0, 1.0), "share of the backward that hides all-reduce")
    launch_ms: tuple[float, float] = _says((30.0, 12.0), "milliseconds to launch a step's kernels")
    cores: tuple[int, int] = _says((7, 14), "CPU cores a GPU that load pictures")
    disk: tuple[float, float] = _says((1.0, 5.0), "GB/s at which one process reads or writes files")
    orion_limit: int = _says(768, "largest step of orion50, views of ORION's own 128 frames")
    imagenet_limit: int = _says(4096, "largest step on ImageNet-1k, that of ViT's authors")
    billion_limit: int = _says(32768, "largest step on 1 billion pictures, that of CLIP")
    imagenet_epochs: int = _says(300, "epochs on ImageNet-1k")
    rank: int = _says(4, "rank of PowerSGD")

    def pairs(self) -> list[tuple[str, Any, str]]:
        """Name, value and meaning of each."""
        return [(f.name, getattr(self, f.name), f.metadata["help"]) for f in fields(self)]


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    """An option for every assumption."""
    group = parser.add_argument_group("assumptions", "of two values the first is the slow case")
    for name, value, words in Assumptions().pairs():
        many = isinstance(value, tuple)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value[0] if many else value),
            nargs=("+" if name == "gpus" else 2) if many else None,
            default=value,
            metavar=None if not many or name == "gpus" else ("SLOW", "FAST"),
            help=f"{words} [{shown(value)}]".replace("%", "%%"),
        )


def assumptions_of(options: argparse.Namespace) -> Assumptions:
    """What the command line says.

    Raises:
        ValueError: A value is out of range.
    """
    found = {name: getattr(options, name) for name, _, _ in Assumptions().pairs()}
    for name, value in found.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        share = name in SHARES
        good = (x >= 0 if name in MAYBE_ZERO else x > 0 for x in values)
        if not all(good) or (share and max(values) > 1):
            least = "0 or more" if name in MAYBE_ZERO else "above 0"
            raise ValueError(
                f"--{name.replace('_', '-')}: must be {least}{' and at most 1' if share else ''}, "
                f"got {shown(value)}"
            )
    return Assumptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


def shown(value: float | Sequence[float]) -> str:
    """A value, or slow and fast one, as text."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return " ".join(f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in values)
