# SPDX-License-Identifier: Apache-2.0
"""The learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_with_warmup(
    total: int, *, warmup: int, warmup_ratio: float, min_ratio: float
) -> Callable[[int], float]:
    """Factor of the learning rate by step, counted from 0.

    A cosine from 1 to ``min_ratio`` over the run; in the first ``warmup`` steps multiplied by a
    line from ``warmup_ratio`` to 1.

    Args:
        total: Optimiser steps of the whole run.
        warmup: Steps of the line; 0: there is none.
        warmup_ratio: Factor at the first step.
        min_ratio: Factor that the cosine ends with.
    """

    def factor(step: int) -> float:
        wave = 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
        value = min_ratio + (1 - min_ratio) * wave
        if step < warmup:
            value *= 1 - (1 - step / warmup) * (1 - warmup_ratio)
        return value

    return factor
