# SPDX-License-Identifier: Apache-2.0
"""Numbers of classes from labels that are numbers or names."""

from __future__ import annotations

from collections.abc import Sequence

# More classes than any set of pictures has: numbers from here on are something else, such as an id.
MOST = 1_000_000


def numbered(
    labels: Sequence[str | int | None], classes: Sequence[str]
) -> tuple[list[str], list[int]]:
    """Names of the classes, and the number of every label.

    Labels that are numbers are the numbers of the classes; names are sorted.

    Args:
        labels: One or more.
        classes: Names in the order of their numbers; empty where they are not known.

    Raises:
        ValueError: One is missing or empty, or a number is not one of a class.
    """
    absent = next((n for n, label in enumerate(labels) if label is None or label == ""), None)
    if absent is not None:
        raise ValueError(f"labels: every row must have one, got none in row {absent}")
    texts = list(map(str, labels))
    if all(text.removeprefix("-").isdecimal() and text.isascii() for text in texts):
        numbers = list(map(int, texts))
        low, high = min(numbers), max(numbers)
        if low < 0 or (classes and high >= len(classes)):
            raise ValueError(
                f"labels: must be in [0, {len(classes) or 'C'}), got {low} to {high}; hidden "
                f"labels of -1 cannot be used"
            )
        if high >= MOST:
            raise ValueError(
                f"labels: numbers of classes must be below {MOST:,}, got {high}; ids are no "
                f"classes, name the field or column of the class with data.label_key"
            )
        return list(classes) or [str(number) for number in range(high + 1)], numbers
    names = sorted(set(texts))
    order = {name: number for number, name in enumerate(names)}
    return names, [order[text] for text in texts]
