# SPDX-License-Identifier: Apache-2.0
"""What ``--keep`` and ``prune.keep`` may be: a number, a share, a list, or a file of heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.machine.limits import MAX_TEXT

# Entries under which a JSON file may have its heads; "kept" is that of report.json.
ENTRIES = ("kept", "heads")
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
    """The heads that a JSON file says are kept.

    Args:
        path: A list with a list of positions for each block, such as [[0, 2], [1]], or an object
            with one under "kept" (``report.json`` of ``kdfast prune``) or "heads".
        sizes: Heads that every block of the model holds.
        flag: The option that names the file, for messages.

    Returns:
        For every block the positions of the kept heads, ascending.

    Raises:
        ValueError: There is no such file, or it holds other heads than the model has.
    """
    rows: Any = _json(path, flag)
    if isinstance(rows, dict):
        rows = next((rows[name] for name in ENTRIES if name in rows), None)
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(
            f"{flag}: {path} must hold a list of heads for each block, such as [[0, 2], [1]], by "
            f"itself or under {' or '.join(ENTRIES)}"
        )
    if len(rows) != len(sizes):
        raise ValueError(f"{flag}: {path} must have {len(sizes)} blocks, got {len(rows)}")
    for block, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        if not all(type(head) is int and 0 <= head < size for head in row):
            raise ValueError(
                f"{flag}: {path}: heads of block {block} must be in [0, {size}), got {row}"
            )
        if len(set(row)) < len(row):
            raise ValueError(f"{flag}: {path}: block {block} must name a head once, got {row}")
    return [sorted(row) for row in rows]


def _json(path: Path, flag: str) -> Any:
    try:
        size, limit = path.stat().st_size, MAX_TEXT()
        if size > limit:
            raise ValueError(f"{flag}: {path} must have at most {limit:,} bytes, got {size:,}")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{flag}: there is no file {path}") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{flag}: {path} must be a JSON file: {error}") from error


def counted(kept: Sequence[Sequence[int]], sizes: Sequence[int], what: str = "heads") -> str:
    """How much is kept, in words: "2 of 3 heads in every block (67 %)".

    A share that was asked for is rounded to whole heads, so only this says what it came to.
    """
    counts = [len(row) for row in kept]
    share = f"{100 * sum(counts) / max(1, sum(sizes)):.0f} %"
    if len(set(zip(counts, sizes, strict=True))) == 1:
        return f"{counts[0]:,} of {sizes[0]:,} {what} in every block ({share})"
    return f"{sum(counts):,} of {sum(sizes):,} {what} in all blocks ({share})"
