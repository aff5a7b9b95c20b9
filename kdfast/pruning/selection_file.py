# SPDX-License-Identifier: Apache-2.0
"""The heads to keep, as a JSON file says them. See docs/use/pruning.md."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast.machine.limits import MAX_TEXT

# Where objects hold the lists: of a file by hand, and of report.json of ``kdfast prune``.
NAMES = ("heads", "kept")


def read_selection(path: str | os.PathLike[str], held: Sequence[int]) -> list[list[int]]:
    """Positions of the heads to keep in every block, for ``prune_heads``.

    The file holds one list per block, ``[[0, 3], [1, 2], ...]``, alone or under "heads" or "kept";
    or an object of the blocks that lose heads, ``{"0": [0, 3], "7": []}``, whose other blocks stay
    whole. Heads are counted from 0 among those that the model holds.

    Args:
        path: The file.
        held: Number of heads that each block of the model holds.

    Returns:
        Ascending positions for every block; empty where a block keeps none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of this form, or does not fit the model; the message says where.
    """
    try:
        size, limit = Path(path).stat().st_size, MAX_TEXT()
        if size > limit:
            raise ValueError(f"{path} must have at most {limit:,} bytes, got {size:,}")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path} with the heads to keep") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    for name in NAMES:
        if isinstance(content, Mapping) and name in content:
            content = content[name]
    rows = _rows(path, content, held)
    return [_checked(path, block, rows[block], count) for block, count in enumerate(held)]


def _rows(path: str | os.PathLike[str], content: Any, held: Sequence[int]) -> list[Any]:
    if isinstance(content, list):
        if len(content) != len(held):
            raise ValueError(
                f"{path} must have one list per block ({len(held)}), got {len(content)}; name only "
                'the blocks that lose heads by {"BLOCK": [HEADS, ...]}'
            )
        return content
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f'{path} must hold lists of heads, [[0, 3], [1, 2], ...] or {{"0": [0, 3], ...}}, got '
            f"{json.dumps(content):.60}"
        )
    known = {str(block) for block in range(len(held))}
    if unknown := [key for key in content if key not in known]:
        raise ValueError(
            f"{path} must name blocks 0 to {len(held) - 1}, got {', '.join(unknown[:5])}"
        )
    return [content.get(str(block), list(range(count))) for block, count in enumerate(held)]


def _checked(path: str | os.PathLike[str], block: int, row: Any, count: int) -> list[int]:
    numbers = isinstance(row, list) and all(type(head) is int for head in row)
    if not numbers or len(set(row)) < len(row) or not all(0 <= head < count for head in row):
        raise ValueError(
            f"{path}: block {block} must be a list of different heads of 0 to {count - 1}, got "
            f"{json.dumps(row):.60}"
        )
    return sorted(row)
