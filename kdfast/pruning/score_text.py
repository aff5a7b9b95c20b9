# SPDX-License-Identifier: Apache-2.0
"""Head scores as a table of text."""

from collections.abc import Sequence

from torch import Tensor

WIDTH = 80
# Rows with more numbers than this are summed up, as those of hidden units.
SHOWN = 64


def score_text(title: str, part: str, rows: Sequence[Tensor]) -> str:
    """A table of at most 80 columns: one row per block, or several where it has many heads.

    Args:
        title: The first line.
        part: What has the scores: "head" or "unit".
        rows: Scores of every block.
    """
    widest = max(len(row) for row in rows)
    if widest > SHOWN:
        header = ("block", f"{part}s", "lowest", "median", "highest")
        body = [(str(block), *_summary(row)) for block, row in enumerate(rows)]
        return "\n".join([title, *_aligned([header, *body])])
    numbers = [[f"{float(score):.3g}" for score in row] for row in rows]
    cell = max([len(number) for row in numbers for number in row] + [len(str(widest))])
    first = len(f"{part}  ")
    each = max(1, (WIDTH - first) // (cell + 2))
    lines = [title, *_wrapped(part, [str(i) for i in range(widest)], first, cell, each)]
    for block, row in enumerate(numbers):
        lines += _wrapped(str(block), row, first, cell, each)
    return "\n".join(lines)


def _summary(row: Tensor) -> tuple[str, ...]:
    if not len(row):
        return ("0", "", "", "")
    return (str(len(row)), *(f"{float(x):.3g}" for x in (row.min(), row.median(), row.max())))


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _wrapped(name: str, row: Sequence[str], first: int, cell: int, each: int) -> list[str]:
    """A row in lines of ``each`` numbers, the name before the first of them."""
    lines = []
    for start in range(0, max(1, len(row)), each):
        head = name if start == 0 else ""
        part = row[start : start + each]
        lines.append((head.rjust(first - 2) + "".join(f"  {x:>{cell}}" for x in part)).rstrip())
    return lines
