# SPDX-License-Identifier: Apache-2.0
"""Rows of a teacher cache: what is kept of the logits of one picture in one variant.

B batch, C classes, K kept classes, N pictures, V variants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from kdfast.chain.cache_sums import row_sums

DTYPES = ("float16", "float32")
SUMS = "sums"
# Field of a row: variant * N + index.
PLACE = "place"
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """Shape and format of a cache.

    Attributes:
        dtype: Number format of the logits, one of ``DTYPES``.
        top_k: Classes kept of each row; None for all.
        temperature: Temperature at which the mass of the other classes is exact.
        length: Number of pictures, N.
        variants: Variants of each, V.
        classes: Number of classes, C; 0 until the teacher was called.
    """

    dtype: str
    top_k: int | None
    temperature: float
    length: int
    variants: int
    classes: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {DTYPES}, got {self.dtype!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: must be 1 or more, got {self.top_k}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: must be above 0 and finite, got {self.temperature}")
        if self.length < 1 or self.variants < 1:
            raise ValueError(
                f"dataset: must have items and variants, got {self.length} and {self.variants}"
            )

    @property
    def kept(self) -> int:
        """K."""
        return self.classes if self.top_k is None else min(self.top_k, self.classes)

    @property
    def partial(self) -> bool:
        """Whether classes are left out."""
        return self.kept < self.classes

    def options(self) -> dict[str, Any]:
        """What has to agree with a finished cache; the temperature only where it was used."""
        used = {"dtype": self.dtype, "length": self.length, "variants": self.variants}
        return used | {"top_k": self.top_k, "temperature": self.top_k and self.temperature}

    def arrays(self) -> dict[str, tuple[DTypeLike, tuple[int, ...]]]:
        """Type and shape of each file."""
        rows = (self.variants, self.length)
        found: dict[str, tuple[DTypeLike, tuple[int, ...]]] = {
            "values": (self.dtype, (*rows, self.kept))
        }
        if self.dtype == "float16":
            found["peak"] = (np.float32, rows)
        if self.partial:
            narrow = np.uint16 if self.classes <= 2**16 else np.uint32
            found["classes"] = (narrow, (*rows, self.kept))
            found["odds"] = (np.float32, rows)
        found[SUMS] = (np.uint32, rows)
        return found


def encode(logits: Tensor, layout: Layout) -> Arrays:
    """Rows of the files for logits (B, C) float32.

    Raises:
        ValueError: float16 cannot hold the distance of a logit to the largest of its row.
    """
    values, found = logits, {}
    if layout.partial:
        values, classes = logits.topk(layout.kept, dim=1)
        scaled = logits.double() / layout.temperature
        others = scaled.scatter(1, classes, -torch.inf).logsumexp(1)
        found["classes"] = classes.numpy()
        # Odds instead of the mass: neither rounds to 0 or 1.
        found["odds"] = (others - scaled.gather(1, classes).logsumexp(1)).numpy()
    if layout.dtype == "float16":
        peak = values.amax(1)
        values = values - peak[:, None]
        if values.min() < torch.finfo(torch.float16).min:
            raise ValueError(
                f"teacher: float16 holds logits up to 65504 below the largest, "
                f"got {float(values.min())}; use dtype='float32'"
            )
        found["peak"] = peak.numpy()
    found["values"] = values.numpy()
    return found


def with_classes(layout: Layout, pairs: Sequence[tuple[int, int]], logits: Tensor) -> Layout:
    """The layout with its number of classes, known from the first logits on.

    Raises:
        ValueError: Logits are not (B, C) of these pairs.
    """
    classes = layout.classes or (logits.shape[1] if logits.dim() == 2 else 0)
    if logits.shape != (len(pairs), classes) or not classes:
        wanted = f"({len(pairs)}, {classes or 'C'})"
        raise ValueError(f"teacher: logits must be {wanted}, got {tuple(logits.shape)}")
    return replace(layout, classes=classes)


def row_type(layout: Layout) -> np.dtype[Any]:
    """One row of all files, in their order, with its place before it."""
    fields = [(name, dtype, shape[2:]) for name, (dtype, shape) in layout.arrays().items()]
    return np.dtype([(PLACE, "<i8"), *fields])


def checked_rows(pairs: Sequence[tuple[int, int]], logits: Tensor, layout: Layout) -> NDArray[Any]:
    """Rows (B,) of ``row_type`` with their checksums.

    Args:
        pairs: (index, variant) of each.
        logits: (B, C) float32.
        layout: With its number of classes.

    Raises:
        ValueError: The logits are not finite, or too far apart for float16.
    """
    bad = (~logits.isfinite()).any(1)
    if bad.any():
        index, variant = pairs[int(bad.nonzero()[0])]
        raise ValueError(
            f"teacher: logits must be finite, got {int(bad.sum())} rows that are not, "
            f"the first of index {index}, variant {variant}"
        )
    rows = np.zeros(len(pairs), row_type(layout))
    for name, values in encode(logits, layout).items():
        rows[name] = values
    at, of = np.array(pairs, np.int64).T
    rows[PLACE] = of * layout.length + at
    # Of what the files will hold, in their types.
    rows[SUMS] = sums_of(rows, layout)
    return rows


def sums_of(rows: NDArray[Any], layout: Layout) -> NDArray[np.uint32]:
    """Checksums (B,) that rows (B,) of ``row_type`` must have."""
    values = {name: rows[name] for name in layout.arrays() if name != SUMS}
    variant, index = np.divmod(rows[PLACE], layout.length)
    return row_sums(values, variant, index)
