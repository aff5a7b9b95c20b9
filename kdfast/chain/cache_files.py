# SPDX-License-Identifier: Apache-2.0
"""Files of a teacher cache: memory-mapped arrays that are whole, or continued, or not there.

C classes, K kept classes, N pictures, V variants.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from kdfast.chain.cache_rows import PLACE, SUMS, Arrays, Layout, checked_rows, with_classes
from kdfast.chain.cache_sums import meta_sum, row_sums
from kdfast.machine.disk import DiskFull, free_bytes, room_for
from kdfast.machine.files import clear_partials, sync, write_text
from kdfast.trainer.logs import LOG

FORMAT = 2
META, LOCK = "meta.json", "lock"
# Files of other processes in a folder that is filled, see ``cache_shards``.
SHARDS = "shard-*.rows"
# Seconds of work that a power loss may cost.
FLUSH = 5.0


def meta_of(key: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Content of ``META``; its "sum" tells caches apart."""
    meta = {"format": FORMAT, "key": key, "layout": asdict(layout)}
    return meta | {"sum": meta_sum(meta)}


def partial_of(directory: Path) -> Path:
    """Where a cache is while it is filled."""
    return directory.with_name(directory.name + ".partial")


def read_files(directory: Path) -> tuple[dict[str, Any], Layout, Arrays]:
    """Key, layout and arrays of a finished cache.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is broken or of another format.
    """
    if not (directory / META).is_file():
        raise FileNotFoundError(f"teacher cache: {directory} must hold a finished cache, got none")
    key, layout = _read_meta(directory)
    return key, layout, _map(directory, layout, "r")


def _read_meta(directory: Path) -> tuple[dict[str, Any], Layout]:
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r} instead of {FORMAT}")
        if meta["sum"] != meta_sum(meta):
            raise ValueError("it does not match its checksum")
        return meta["key"], Layout(**meta["layout"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(_broken(directory / META, error)) from error


def _broken(path: Path, reason: object) -> str:
    return (
        f"teacher cache: {path} is broken: {reason}; delete {path.parent}, or build it with "
        f"rebuild=True"
    )


def _map(directory: Path, layout: Layout, mode: Any) -> Arrays:
    return {
        name: _open(directory / f"{name}.npy", mode, dtype, shape)
        for name, (dtype, shape) in layout.arrays().items()
    }


def _open(path: Path, mode: Any, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        array = np.lib.format.open_memmap(path, mode)
    except Exception as error:  # numpy evaluates the header, which may be any text
        raise ValueError(_broken(path, error)) from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        got = f"it must be {shape} {np.dtype(dtype)}, got {array.shape} {array.dtype}"
        raise ValueError(_broken(path, got))
    return array


def _allocate(path: Path) -> None:
    """Take the place of a file: met while writing to its map, a full disk would kill the process.

    Raises:
        DiskFull: There is not enough.
    """
    size = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            hint = "use a smaller top_k, fewer variants or another folder"
            taken = path.stat().st_blocks * 512
            raise DiskFull(
                f"teacher cache: {path} needs {size:,} bytes, got "
                f"{free_bytes(path.parent) + taken:,} free: {error.strerror}; {hint}"
            ) from error


class Writer:
    """Fills ``directory`` + ".partial", which becomes ``directory`` when every row is there.

    Attributes:
        partial: The folder that is filled.
        layout: Its number of classes is 0 before the first row.
        done: (V, N) rows that are on the disk.
        token: Changes with every writer; the file ``LOCK`` holds it while this one is at work.
    """

    def __init__(self, directory: Path, key: dict[str, Any], layout: Layout) -> None:
        self.key, self.directory, self.layout = key, directory, layout
        self.partial = partial_of(directory)
        self.token = secrets.token_hex(16)
        self.done: NDArray[np.bool_] = np.zeros((layout.variants, layout.length), np.bool_)
        self._arrays: Arrays = {}
        self._done_file: Any = None
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._flushed = time.monotonic()

    def __enter__(self) -> Writer:
        """Take the lock and continue what an interrupted build left."""
        self.partial.mkdir(parents=True, exist_ok=True)
        # Not emptied before it is ours: another writer's token may stand in it.
        # Without a buffer, which a full disk would keep from being closed.
        self._lock: BinaryIO = (self.partial / LOCK).open("ab", buffering=0)
        try:
            # The system gives it back when the process dies, however it dies.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise BlockingIOError(
                f"teacher cache: {self.directory} is being built by another process"
            ) from error
        try:
            with room_for(self.partial / LOCK):
                self._lock.truncate(0)
                self._lock.write(self.token.encode())
            clear_partials(self.partial)
            self._continue()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _continue(self) -> None:
        if not (self.partial / META).is_file():
            return
        try:
            key, layout = _read_meta(self.partial)
            if key != self.key or replace(layout, classes=0) != self.layout:
                raise ValueError("it belongs to another key or other options")
            self._arrays = _map(self.partial, layout, "r+")
            self._done_file = _open(self.partial / "done.npy", "r+", np.bool_, self.done.shape)
        except (OSError, ValueError) as error:
            LOG.info("an unfinished teacher cache is thrown away: %s", error)
            self._arrays = {}
            for path in self.partial.iterdir():
                if path.name != LOCK:
                    path.unlink()
            return
        self.layout, self.done = layout, self._done_file
        self._forget_damaged()
        LOG.info("an unfinished teacher cache is continued, %d rows are there", self.done.sum())

    def _forget_damaged(self) -> None:
        """Computes those rows again that are not what was written, or never were there."""
        damaged = 0
        for number, done in enumerate(self.done):
            index = np.flatnonzero(done)
            variant = np.full(len(index), number)
            rows = {name: array[variant, index] for name, array in self._arrays.items()}
            sums = rows.pop(SUMS)
            wrong = index[sums != row_sums(rows, variant, index)]
            done[wrong] = False
            damaged += len(wrong)
        if damaged:
            LOG.info("%d rows of it are damaged and computed again", damaged)

    def write(self, pairs: Sequence[tuple[int, int]], logits: Tensor) -> None:
        """Write the logits (B, C) of pairs (index, variant).

        Raises:
            ValueError: They are not finite, or not of this shape.
        """
        layout = with_classes(self.layout, pairs, logits)
        rows = checked_rows(pairs, logits, layout)
        if not self._arrays:
            self._create(layout)
        self.put(rows)

    def put(self, rows: NDArray[Any]) -> None:
        """Write rows (B,) of ``checked_rows``."""
        variant, index = np.divmod(rows[PLACE], self.layout.length)
        for name, array in self._arrays.items():
            array[variant, index] = rows[name]
        self._pending.append((variant, index))
        if time.monotonic() - self._flushed > FLUSH:
            self.flush()

    def _create(self, layout: Layout) -> None:
        self.layout = layout
        files = self.layout.arrays() | {"done": (np.bool_, self.done.shape)}
        for name, (dtype, shape) in files.items():
            path = self.partial / f"{name}.npy"
            with room_for(path):
                self._arrays[name] = np.lib.format.open_memmap(path, "w+", dtype, shape)
                _allocate(path)
        self.done = self._done_file = self._arrays.pop("done")
        write_text(self.partial / META, json.dumps(meta_of(self.key, self.layout), indent=1))

    def flush(self) -> None:
        """Bring what was written to the disk."""
        # First the rows, then that they are there: never the other way round on the disk.
        for array in self._arrays.values():
            array.flush()  # type: ignore[attr-defined]
        for rows in self._pending:
            self.done[rows] = True
        if self._pending:
            self._done_file.flush()
        self._pending, self._flushed = [], time.monotonic()

    def finish(self) -> None:
        """Put the cache in place; every row must be there."""
        self.flush()
        self._publish()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Keep what was written, and give the lock back."""
        try:
            if kind is not None:
                self.flush()
        finally:
            self._lock.close()

    def _publish(self) -> None:
        old = _old(self.directory)
        shutil.rmtree(old, ignore_errors=True)
        if self.directory.exists():
            os.replace(self.directory, old)
        os.replace(self.partial, self.directory)
        sync(self.directory.parent)
        tidy(self.directory)


def _old(directory: Path) -> Path:
    return directory.with_name(directory.name + ".old")


def tidy(directory: Path) -> None:
    """Remove what is left beside a finished cache when its builder is killed at the very end."""
    for path in (directory / "done.npy", directory / LOCK, *directory.glob(SHARDS)):
        path.unlink(missing_ok=True)
    shutil.rmtree(_old(directory), ignore_errors=True)
