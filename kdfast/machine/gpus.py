# SPDX-License-Identifier: Apache-2.0
"""What data sheets say of GPUs, for plans made on machines without them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class Gpu(NamedTuple):
    """One model of GPU.

    Attributes:
        title: Its name.
        gib: Memory.
        half: TFLOP/s of dense bf16 and fp16 matrix products with sums in fp32.
        single: TFLOP/s of fp32 outside of the tensor cores.
    """

    title: str
    gib: int
    half: float
    single: float


GPUS = {
    "3090": Gpu("RTX 3090", 24, 71, 35.6),
    "4090": Gpu("RTX 4090", 24, 165, 82.6),
    "5090": Gpu("RTX 5090", 32, 209.5, 104.8),
    "a6000": Gpu("RTX A6000", 48, 154.8, 38.7),
    "l4": Gpu("L4", 24, 121, 30.3),
    "l40s": Gpu("L40S", 48, 362, 91.6),
    "a10": Gpu("A10", 24, 125, 31.2),
    "a100": Gpu("A100", 80, 312, 19.5),
    "h100": Gpu("H100 SXM", 80, 989, 67),
    "h200": Gpu("H200", 141, 989, 67),
}


@dataclass(frozen=True)
class Gpus:
    """Some GPUs of one model."""

    count: int
    each: Gpu

    def __str__(self) -> str:
        return f"{self.count} x {self.each.title}" if self.count > 1 else self.each.title


def gpus_of(text: str) -> Gpus:
    """The GPUs of a text such as "4x4090" or "a100".

    Raises:
        ValueError: The model is not known, or there are none of it.
    """
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(?:rtx\s*)?(\w+)", text.strip().lower())
    if found is None or found[2] not in GPUS or int(found[1] or 1) < 1:
        names = ", ".join(GPUS)
        raise ValueError(f"must be [COUNTx]NAME with one of {names}, got {text!r}")
    return Gpus(int(found[1] or 1), GPUS[found[2]])
