# SPDX-License-Identifier: Apache-2.0
"""Building a model that a file describes, within what the file's size allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from kdfast.machine.limits import MAX_GROWTH

# Small models may take so many bytes and have so many parts, whatever their file has.
FREE_BYTES, FREE_PARTS = 2 << 30, 4096
# Parts of a model for each tensor of its file: modules without tensors, tensors not in the file.
PARTS = 16
# The largest count in a description, and the bytes of weights that allow one more.
FREE_COUNT, BYTES_PER_COUNT = 1 << 20, 64
# The largest depth of any small file, and the last words of the names of depths.
FREE_DEPTH = 256
DEEP = ("depth", "layers", "layer", "blocks", "stages")
# Last words of names of numbers that libraries take unchecked, and compute NaN or nothing with.
RANGES = {
    "eps": (0.0, 1.0),
    "epsilon": (0.0, 1.0),
    "theta": (1e-30, 1e30),
    "prob": (0.0, 1.0),
    "dropout": (0.0, 1.0),
}
# Those of them that are one number in every library, and no switch.
SINGLE = ("eps", "epsilon")


class Size(NamedTuple):
    """What a file of weights holds.

    Attributes:
        path: The file, for messages.
        bytes: Its size.
        tensors: Its number of tensors.
    """

    path: Path
    bytes: int
    tensors: int


@contextmanager
def bounded(size: Size) -> Iterator[None]:
    """Context in which modules are built, and that ends a building which would not end itself.

    Raises:
        ValueError: The modules have many more parts or bytes than the file of their weights.
    """
    parts, total = 0, 0.0

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal parts, total
        parts += 1
        if isinstance(value, Tensor):
            total += math.prod(value.shape) * value.element_size()
        if parts > FREE_PARTS + PARTS * size.tensors:
            raise ValueError(
                f"it describes a model of more than {parts - 1:,} parts for the {size.tensors:,} "
                f"tensors of {size.path}"
            )
        if total > FREE_BYTES + MAX_GROWTH() * size.bytes:
            raise ValueError(
                f"it describes a model of more than {total:,.0f} bytes for the {size.bytes:,} of "
                f"{size.path}; {MAX_GROWTH.name} changes that limit"
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_counts(values: Any, size: Size, name: str = "") -> None:
    """Raises ValueError for a number in a description that no model of this file can have.

    Args:
        values: Plain values, nested as JSON is.
        size: The weights that belong to it.
        name: Dotted name of the values.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            check_counts(value, size, f"{name}.{key}".strip("."))
    elif isinstance(values, list) and _last_word(name) not in SINGLE:
        for value in values:
            check_counts(value, size, name)
    elif _last_word(name) in RANGES and values is not None:
        _check_range(values, name)
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{name} must be finite, got {values}")
    elif isinstance(values, int) and not isinstance(values, bool):
        deep = _last_word(name) in DEEP
        most = FREE_DEPTH + size.tensors if deep else max(FREE_COUNT, size.bytes // BYTES_PER_COUNT)
        if not -most <= values <= most:
            raise ValueError(
                f"{name} must be at most {most:,} for weights of {size.tensors:,} tensors and "
                f"{size.bytes:,} bytes, got {str(values)[:30]}"
            )


def _check_range(value: Any, name: str) -> None:
    low, high = RANGES[_last_word(name)]
    if isinstance(value, bool) and _last_word(name) not in SINGLE:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r:.80}")


def _last_word(name: str) -> str:
    return name.rpartition(".")[2].split("_")[-1]
