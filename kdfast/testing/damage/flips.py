# SPDX-License-Identifier: Apache-2.0
"""Single flipped bits in every file that is written and read again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

import kdfast
from kdfast.chain.teacher_cache import TeacherCache
from kdfast.models.checkpoint import load_backbone, save_backbone
from kdfast.pruning import Calibration, HeadScores, calibrate
from kdfast.testing.damage.models import MAKERS, eva, saved, timm_vit
from kdfast.testing.damage.tally import Tally, differs, put, taken
from kdfast.trainer.commits import load_checkpoint, save_checkpoint

KEY = {"teacher": "t", "sizes": [1, 2.5]}
PICTURES, VARIANTS = 48, 2


class Subject(NamedTuple):
    """Files and their reader.

    Attributes:
        kind: What is counted together.
        make: Writes them into a folder.
        read: What they hold.
    """

    kind: str
    make: Callable[[Path], object]
    read: Callable[[Path], Any]


class Pictures(Dataset[Any]):
    """Pictures that name themselves."""

    variants = VARIANTS

    def __len__(self) -> int:
        return PICTURES

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        index, variant = place
        return {"image": torch.tensor([float(index), float(variant)])}


def teacher(images: Tensor) -> Tensor:
    """Logits (B, 10) of them."""
    place = 7 * images[:, :1] + 3 * images[:, 1:]
    return 40 * torch.sin(place + torch.arange(10))


def caches() -> list[Subject]:
    """Finished caches of every layout, and one that was interrupted."""

    def build(folder: Path, **options: Any) -> TeacherCache:
        return TeacherCache.build(teacher, Pictures(), folder, key=KEY, **options)

    def rows(cache: TeacherCache) -> list[Tensor]:
        return [cache.logits(range(PICTURES), v) for v in range(VARIANTS)]

    def half(folder: Path) -> None:
        def fails(images: Tensor) -> Tensor:
            if images[:, 0].max() > PICTURES / 2 and images[:, 1].max() > 0:
                raise KeyboardInterrupt
            return teacher(images)

        try:
            TeacherCache.build(fails, Pictures(), folder / "c", key=KEY, batch_size=8)
        except KeyboardInterrupt:
            return

    layouts: list[dict[str, Any]] = [
        {"top_k": None, "dtype": "float16"},
        {"top_k": 4, "dtype": "float16"},
        {"top_k": None, "dtype": "float32"},
    ]
    found = [
        Subject(
            "teacher cache",
            partial(build, **options),
            lambda folder: rows(TeacherCache.open(folder, KEY)),
        )
        for options in layouts
    ]
    return [
        *found,
        Subject(
            "teacher cache, interrupted",
            half,
            lambda folder: rows(build(folder / "c", batch_size=8)),
        ),
    ]


def checkpoints() -> list[Subject]:
    """What ``torch.save`` writes."""
    torch.manual_seed(0)
    state = {"step": 3, "best": [0.25, None], "module": {"w": torch.randn(64, 64)}}
    return [
        Subject(
            "checkpoint",
            lambda folder: save_checkpoint(folder, state),
            lambda folder: load_checkpoint(folder / "last.pt"),
        )
    ]


def models() -> list[Subject]:
    """Folders of ``save_pretrained``, backbones, calibrations and scores."""

    def loaded(folder: Path) -> list[Any]:
        model = kdfast.load_pretrained(folder)
        plain = [
            (name, {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)})
            for name, module in model.named_modules()
        ]
        return [dict(model.state_dict()), plain]

    def scores(folder: Path) -> None:
        HeadScores([torch.rand(3, dtype=torch.float64)] * 2, "given").save(folder / "s.json")

    torch.manual_seed(0)
    vit = timm_vit().eval()
    images = torch.randn(4, 3, 32, 32)
    return [
        *(Subject("saved model", partial(saved, name), loaded) for name in MAKERS),
        Subject(
            "backbone",
            lambda folder: save_backbone(eva(), folder / "b.safetensors"),
            lambda folder: dict(load_backbone(folder / "b.safetensors").state_dict()),
        ),
        Subject(
            "calibration",
            lambda folder: calibrate(vit, [images], progress=False).save(folder / "c.safetensors"),
            lambda folder: [
                [m.mean, m.covariance, m.tokens, m.weight_norm]
                for m in Calibration.load(folder / "c.safetensors", vit).attentions.values()
            ],
        ),
        Subject(
            "head scores",
            scores,
            lambda folder: HeadScores.load(folder / "s.json").scores,
        ),
    ]


def flip(tally: Tally, subject: Subject, root: Path, count: int, draw: random.Random) -> None:
    """Flips ``count`` bits, one at a time: half of them in files drawn evenly, half by size."""
    folder = root / "flips"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subject.make(folder)
    files = taken(folder)
    shutil.copytree(folder, root / "whole", dirs_exist_ok=True)
    want = subject.read(folder)
    names = [name for name, data in files.items() if data]
    for number in range(count):
        sizes = [len(files[name]) for name in names]
        name = draw.choices(names, sizes if number % 2 else None)[0]
        # The first bytes say what the rest is: drawn more often than their number.
        last = len(files[name]) if number % 3 else min(len(files[name]), 512)
        place, bit = draw.randrange(last), draw.randrange(8)
        damaged = bytearray(files[name])
        damaged[place] ^= 1 << bit
        shutil.rmtree(folder)
        put(folder, {**files, name: bytes(damaged)})
        text = f"{name}, bit {bit} of byte {place:,} of {len(damaged):,}"
        tally.trial(subject.kind, text, lambda: subject.read(folder), differs(want))
    shutil.rmtree(folder)


def subjects() -> list[Subject]:
    """All of them."""
    return [*caches(), *checkpoints(), *models()]
