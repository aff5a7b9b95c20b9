# SPDX-License-Identifier: Apache-2.0
"""What ``--keep`` and ``prune.keep`` may be: a number, a share, a list, or a file of heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdfast.pruning.selection_file import read_selection

Keep = int | float | list[int]


def parse_keep(text: str) -> Keep | Path:
    """The value of ``--keep``.

    Args:
        text: A number of heads (6), a share (0.5 or 50%), a number for each block (6,6,4), or the
            name of a JSON file, see ``read_heads``.

    Raises:
        ValueError: It is none of these; the message says what is.
    """
    try:
        if text.endswith(".json"):
            return Path(text)
        if "," in text:
            return [int(part) for part in text.strip("[] ").split(",")]
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(
            "must be a number of heads (6), a share (0.5), a number for each block (6,6,4), or a "
            f"JSON file of kept heads, got {text!r}"
        ) from None


def read_heads(path: Path, sizes: Sequence[int], flag: str) -> list[list[int]]:
    """``read_selection`` with the option that names the file in front of its errors.

    Raises:
        ValueError: There is no such file, or it holds other heads than the model has.
    """
    try:
        return read_selection(path, sizes)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: {error}") from error


def counted(kept: Sequence[Sequence[int]], sizes: Sequence[int], what: str = "heads") -> str:
    """How much is kept, in words: "2 of 3 heads in every block (67 %)".

    A share that was asked for is rounded to whole heads, so only this says what it came to.
    """
    counts = [len(row) for row in kept]
    share = f"{100 * sum(counts) / max(1, sum(sizes)):.0f} %"
    if len(set(zip(counts, sizes, strict=True))) == 1:
        return f"{counts[0]:,} of {sizes[0]:,} {what} in every block ({share})"
    return f"{sum(counts):,} of {sum(sizes):,} {what} in all blocks ({share})"
