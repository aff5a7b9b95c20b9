# SPDX-License-Identifier: Apache-2.0
"""What trainers read encoded pictures from, wherever they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


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

    def fetch(self, row: int) -> bytes:
        """The bytes of a picture.

        Raises:
            OSError: The part of the store cannot be opened.
            Unreadable: The bytes are not those of the picture.
        """
