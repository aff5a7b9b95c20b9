# SPDX-License-Identifier: Apache-2.0
"""Shards of a teacher cache: rows of one process of many, on their way into the cache.

Every process but the first appends its rows to a file of its own, so no two ever write to one file,
on whatever filesystem and machine. The first process takes them into the cache's files. A shard
starts with the checksum of the cache's description, and each row with its place; rows have their
own checksums, so a killed process leaves whole rows and at most a part of one.

B rows.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdfast.chain.cache_files import FLUSH, LOCK, SHARDS, Writer, meta_of, partial_of
from kdfast.chain.cache_rows import (
    PLACE,
    SUMS,
    Layout,
    checked_rows,
    row_type,
    sums_of,
    with_classes,
)
from kdfast.machine.disk import require_room, room_for
from kdfast.machine.files import sync

# Rows that are taken over at once.
TAKEN = 1 << 16
# Seconds in which a file that one machine wrote must be seen by another: caches of network
# filesystems may hold an older state of a folder for so long.
SEEN = 60.0
# Checksum of the cache's description, bytes of a row.
_HEAD = struct.Struct("<II")


@dataclass(frozen=True)
class Written:
    """A shard as its process left it.

    Attributes:
        name: Of its file.
        rows: How many it holds.
    """

    name: str
    rows: int


class Shard:
    """Appends the rows of one process."""

    def __init__(
        self, directory: Path, key: dict[str, Any], layout: Layout, *, rank: int, rows: int
    ) -> None:
        """Set up; the file is made with the first row.

        Args:
            directory: Of the cache.
            key: Of the cache.
            layout: Of the cache, with or without its number of classes.
            rank: This process.
            rows: How many it will write at most.
        """
        self.key, self.layout, self.rows, self.expected = key, layout, 0, rows
        self.path = partial_of(directory) / SHARDS.replace("*", f"{rank:05d}")
        self._file: Any = None
        self._flushed = time.monotonic()

    def write(self, pairs: Sequence[tuple[int, int]], logits: Tensor) -> None:
        """Append the logits (B, C) of pairs (index, variant).

        Raises:
            ValueError: They are not finite, or not of this shape.
            DiskFull: There is no room for them.
        """
        self.layout = with_classes(self.layout, pairs, logits)
        rows = checked_rows(pairs, logits, self.layout)
        with room_for(self.path):
            if self._file is None:
                self._create()
            self._file.write(rows.tobytes())
            self.rows += len(rows)
            if time.monotonic() - self._flushed > FLUSH:
                self._flush()

    def _create(self) -> None:
        require_room(self.path, self.expected * row_type(self.layout).itemsize)
        # The first process has removed those of earlier builds: another one here is an error.
        self._file = self.path.open("xb")
        self._file.write(_head(self.key, self.layout))

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._flushed = time.monotonic()

    def close(self) -> Written:
        """Bring the rows to the disk."""
        if self._file is not None:
            with room_for(self.path), self._file:
                self._flush()
            sync(self.path.parent)
        return Written(self.path.name, self.rows)


def _head(key: dict[str, Any], layout: Layout) -> bytes:
    return _HEAD.pack(meta_of(key, layout)["sum"], row_type(layout).itemsize)


def take(writer: Writer, path: Path) -> Iterator[int]:
    """Move the rows of a shard into the cache, some at a time; the file goes at the end.

    Rows that are damaged are left out, and so is a file of another cache.

    Args:
        writer: Fills the cache.
        path: The shard.

    Yields:
        How many rows each part brought.
    """
    layout = writer.layout
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        if layout.classes and head == _head(writer.key, layout):
            kind = row_type(layout)
            while part := file.read(TAKEN * kind.itemsize):
                rows = np.frombuffer(part, kind, len(part) // kind.itemsize)
                rows = rows[_whole(rows, layout)]
                writer.put(rows)
                yield len(rows)
    # First the rows are on the disk, then their copy goes.
    writer.flush()
    path.unlink()


def _whole(rows: NDArray[Any], layout: Layout) -> NDArray[np.bool_]:
    """Which rows (B,) are what was written."""
    inside = (rows[PLACE] >= 0) & (rows[PLACE] < layout.variants * layout.length)
    good: NDArray[np.bool_] = inside & (rows[SUMS] == sums_of(rows, layout))
    return good


def left_behind(writer: Writer) -> list[Path]:
    """Shards of builds that were interrupted."""
    return sorted(writer.partial.glob(SHARDS))


def require_seen(directory: Path, token: str) -> None:
    """Raises ValueError unless this process sees the folder that a writer on another one made.

    Args:
        directory: Of the cache.
        token: Of the writer.
    """
    if not eventually(lambda: _token(directory) == token):
        raise ValueError(not_shared(directory))


def _token(directory: Path) -> str:
    path = partial_of(directory) / LOCK
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def not_shared(directory: Path) -> str:
    """Message for a folder that is not the same for all processes."""
    return (
        f"teacher cache: {directory} must be in a folder that all processes share, but this one "
        f"does not see what another wrote there in the last {SEEN:.0f} s; name a folder that all "
        f"machines share (cache_dir)"
    )


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something about files comes true within ``SEEN`` seconds."""
    end, pause = time.monotonic() + SEEN, 0.01
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    return True


def require_whole(directory: Path, written: Written) -> None:
    """Raises ValueError unless all rows of a shard that another process wrote are seen here."""
    path = partial_of(directory) / written.name

    def whole() -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:  # opening asks a network filesystem for its newest state
            head = file.read(_HEAD.size)
            size = os.fstat(file.fileno()).st_size
        if len(head) < _HEAD.size:
            return False
        _, each = _HEAD.unpack(head)
        return size >= _HEAD.size + written.rows * int(each)

    if not eventually(whole):
        raise ValueError(not_shared(directory))
