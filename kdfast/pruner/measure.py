# SPDX-License-Identifier: Apache-2.0
"""What a pruned model costs and is worth: counts, bytes, times and quality."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from kdfast.machine.weights import tensor_bytes
from kdfast.pruner.choose import Chosen
from kdfast.pruner.work import Work
from kdfast.pruning import pruning_report
from kdfast.pruning.folder import WEIGHTS
from kdfast.pruning.latency import Latency, latencies
from kdfast.pruning.quality import Quality, answers, quality_of
from kdfast.pruning.report import PruningReport
from kdfast.resolve import class_count


@dataclass(frozen=True)
class Measured:
    """A pruned model in numbers.

    Attributes:
        report: Counts.
        params: Parameters of the pruned model, without blocks that went.
        latency: As ``latencies`` names them.
        quality: None where there were no pictures to measure it on.
        original_bytes: Of the original's tensors, which is what its file would take.
    """

    report: PruningReport
    params: int
    latency: dict[str, Latency]
    quality: Quality | None
    original_bytes: int


def measured(
    work: Work, chosen: Chosen, pruned: nn.Module, latency: dict[str, Latency]
) -> Measured:
    """Counts and quality of a pruned model beside its times."""
    keep = [[len(row) for row in chosen.heads]]
    mlp_keep = None if chosen.units is None else [len(row) for row in chosen.units]
    report = pruning_report(work.model, keep, mlp_keep=mlp_keep)
    params = sum(p.numel() for p in pruned.parameters())
    size = tensor_bytes(dict(work.model.state_dict()))
    return Measured(report, params, latency, _quality(work, pruned), size)


def timed(work: Work, pruned: nn.Module, images: Tensor) -> dict[str, Latency]:
    """Times of the original and of a pruned model, in the type of the images."""
    whole, small = _as_type(work.model, images), _as_type(pruned, images)
    return latencies(whole, small, images, work.options.rounds)


def file_bytes(folder: Path) -> int:
    """Bytes of the weights of a saved model."""
    return (folder / WEIGHTS).stat().st_size


def _quality(work: Work, pruned: nn.Module) -> Quality | None:
    if work.judged is None or work.original is None:
        return None
    got = answers(pruned, work.judged.batches)
    classes = class_count(work.model)
    return quality_of(got, work.original, classes=classes, labels=work.judged.labels)


def _as_type(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in the type of the images, a copy where it has another."""
    if next(model.parameters()).dtype == images.dtype:
        return model
    return copy.deepcopy(model).to(images.dtype)
