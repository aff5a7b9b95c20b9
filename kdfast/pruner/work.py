# SPDX-License-Identifier: Apache-2.0
"""What one run of ``kdfast prune`` starts from: the model and every picture that it needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from kdfast.pruner.checks import asked, by_latency, check_model, compensates, reads_pictures
from kdfast.pruning import Calibration, calibrate
from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.quality import answers
from kdfast.resolve import class_count
from kdfast.sources import (
    JudgedPictures,
    image_batches,
    is_random,
    judged_pictures,
    load_model,
    noise,
)
from kdfast.sources.pictures import spread
from kdfast.sources.shown import Member


@dataclass(frozen=True)
class Work:
    """A model and what it is looked at with.

    Attributes:
        options: The command line.
        anatomy: The model and its parts that can be pruned.
        batches: Pictures for scores; none where no score reads any.
        pictures: Pictures for the compensation; none without it.
        calibration: Moments on these.
        judged: Pictures for the quality; None where there are none.
        original: The model's answers on them.
        images: One picture, or noise, that is timed.
    """

    options: argparse.Namespace
    anatomy: Anatomy
    batches: list[Tensor]
    pictures: list[Tensor]
    calibration: Calibration | None
    judged: JudgedPictures | None
    original: Tensor | None
    images: Tensor

    @property
    def model(self) -> nn.Module:
        """The model as it was given."""
        return self.anatomy.model

    @property
    def heads(self) -> list[int]:
        """Heads that every block holds."""
        return [len(site.held) for site in self.anatomy.attentions]

    @property
    def units(self) -> list[int]:
        """Hidden units that every MLP holds."""
        return [len(site.held) for site in self.anatomy.mlps]


def prepare(options: argparse.Namespace) -> Work:
    """The model and its pictures.

    Raises:
        UsageError: The model, the folder or their combination cannot be used.
    """
    with asked(OSError, ValueError, ImportError):
        model = load_model(options.model, options.checkpoint, options.pretrained)
    if is_random(options.model, options.checkpoint, pretrained=options.pretrained):
        print("note: the weights are random; --pretrained or --checkpoint brings trained ones")
    with asked(TypeError, ValueError):
        anatomy = anatomy_of("kdfast.prune", model)
        size = anatomy.adapter.image_size(model)
        check_model(anatomy, options)
    scored = options.batches * options.batch_size if reads_pictures(options) else 0
    fitted = options.calibrate if compensates(options) else 0
    batches = _read(model, size, scored, options)
    print(f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    pictures = _read(model, size, fitted, options)
    calibration = _calibrated(model, pictures, options)
    judged = _judged(model, size, (scored, fitted), batches or pictures, options)
    images = (batches or pictures or [noise(model, size)])[0][:1]
    original = None if judged is None else answers(model, judged.batches)
    return Work(options, anatomy, batches, pictures, calibration, judged, original, images)


def _read(
    model: nn.Module, size: tuple[int, int], count: int, options: argparse.Namespace
) -> list[Tensor]:
    """Batches of pictures."""
    if not count:
        return []
    with asked(OSError, ValueError, ImportError):
        return list(
            image_batches(model, size, options.data, count=count, batch_size=options.batch_size)
        )


def _judged(
    model: nn.Module,
    size: tuple[int, int],
    used: tuple[int, int],
    scenes: list[Tensor],
    options: argparse.Namespace,
) -> JudgedPictures | None:
    """Pictures for the quality: of the folder, or else the scenes that were drawn anyway."""
    if not options.pictures:
        return None
    if options.data is None:
        origin = "the same rendered driving scenes; --data takes pictures of your own"
        return JudgedPictures(scenes, None, origin) if scenes else None
    with asked(OSError, ValueError, ImportError):
        known: set[Path | Member] = set()
        for count in filter(None, used):
            known |= set(spread(options.data, count, "--data"))
        return judged_pictures(
            model,
            size,
            options.data,
            count=options.pictures,
            batch_size=options.batch_size,
            classes=class_count(model),
            used=known,
        )


def _calibrated(
    model: nn.Module, pictures: Sequence[Tensor], options: argparse.Namespace
) -> Calibration | None:
    """The moments for the compensation, with a word about it."""
    if not pictures:
        return None
    origin = options.data or "rendered driving scenes"
    how = ", one site after the other" if options.sequential else ""
    why = "" if options.compensate or by_latency(options) else " (--no-compensate turns it off)"
    print(f"compensating on {sum(map(len, pictures))} pictures of {origin}{how}{why}")
    return calibrate(model, pictures)
