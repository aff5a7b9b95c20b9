# SPDX-License-Identifier: Apache-2.0
"""What trainers read encoded pictures from, wherever they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kdfast.data.corrupt import Unreadable


class Stored(Protocol):
    """Encoded pictures by number of the row."""

    @property
    def names(self) -> Sequence[str]:
        """Name of every row."""

    def __len__(self) -> int:
        """Number of rows."""

    def where(self, row: int) -> str:
        """Where a row is, for messages."""

    def stamp(self, row: int) -> str:
        """Text that differs where the picture of a row does."""

    def fetch(self, rows: Sequence[int]) -> list[bytes | Unreadable]:
        """The bytes of pictures, or why they are not those of a picture.

        Raises:
            OSError: A part of the store cannot be opened.
        """
