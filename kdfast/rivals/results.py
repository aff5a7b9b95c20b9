# SPDX-License-Identifier: Apache-2.0
"""What was measured of each candidate, as numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.machine.timing import FEW
from kdfast.rivals.race import Contender
from kdfast.rivals.rival import main_tensor


@dataclass(frozen=True)
class Row:
    """One candidate; what was not measured is None, and ``reason`` says why.

    Attributes:
        model: "whole" or "pruned".
        name: Of the rival.
        dtype: Of its products with weights.
        ms: Median of a call; of the quiet samples where there are FEW of them.
        p95_ms: 95th percentile of the same samples.
        images_per_second: By the median.
        file_bytes: Size of the model on disk.
        memory_bytes: Highest resident memory of its process while it ran, less what the process
            took before it got the model.
        cosine: Mean over pictures of the cosine with the original's output.
        top1: Share of pictures with the original's class; None without classes.
        prepare_seconds: From the model, or the exported file, to the first answer.
        samples: Timed calls.
        quiet: How many of them the machine was ours in.
        note: What is worth knowing about how it ran.
        reason: Why it, or its agreement, was not measured; empty if it was.
    """

    model: str
    name: str
    dtype: str
    ms: float | None = None
    p95_ms: float | None = None
    images_per_second: float | None = None
    file_bytes: int | None = None
    memory_bytes: int | None = None
    cosine: float | None = None
    top1: float | None = None
    prepare_seconds: float | None = None
    samples: int = 0
    quiet: int = 0
    note: str = ""
    reason: str = ""


@torch.no_grad()
def answers(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """The model's outputs for all pictures of the batches, (pictures, ...), fp32."""
    return torch.cat([main_tensor(model(batch)).float() for batch in batches])


def row_of(contender: Contender, reference: Tensor, batch: int, count: int, classes: bool) -> Row:
    """The row of a candidate.

    Args:
        contender: After a race, or what was left of one.
        reference: The original's answers, (pictures, ...).
        batch: Pictures of a call.
        count: Pictures that are not repetitions, which fill the last batch.
        classes: Whether the outputs are scores of classes.
    """
    rival = contender.rival
    if not contender.samples:
        reason = contender.reason or "stopped before it was timed"
        return Row(contender.subject, rival.name, rival.dtype, reason=reason)
    every = [seconds for seconds, _ in contender.samples]
    quiet = [seconds for seconds, good in contender.samples if good]
    used = quiet if len(quiet) >= FEW else every
    ms = 1e3 * statistics.median(used)
    cosine, top1 = _agreement(contender.outputs, reference, batch, count)
    return Row(
        model=contender.subject,
        name=rival.name,
        dtype=rival.dtype,
        ms=ms,
        p95_ms=1e3 * float(numpy.percentile(used, 95)),
        images_per_second=1e3 * batch / ms,
        file_bytes=contender.nbytes,
        memory_bytes=contender.memory or None,
        cosine=cosine,
        top1=top1 if classes else None,
        prepare_seconds=contender.prepare_seconds,
        samples=len(every),
        quiet=len(quiet),
        note=contender.note,
        reason=contender.reason,
    )


def _agreement(
    outputs: Mapping[int, numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float32]]],
    reference: Tensor,
    batch: int,
    count: int,
) -> tuple[float | None, float | None]:
    """Cosine and top-1 agreement over the pictures that were answered."""
    got, want = [], []
    for index, output in sorted(outputs.items()):
        first = index * batch
        last = min(first + batch, count)
        got.append(torch.from_numpy(output)[: last - first])
        want.append(reference[first:last])
    if not got:
        return None, None
    mine, theirs = torch.cat(got).flatten(1).double(), torch.cat(want).flatten(1).double()
    same = (mine.argmax(1) == theirs.argmax(1)).double().mean().item()
    return F.cosine_similarity(mine, theirs).mean().item(), same
