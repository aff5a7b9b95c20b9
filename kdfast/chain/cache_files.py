# SPDX-License-Identifier: Apache-2.0
"""Files of a teacher cache: memory-mapped arrays that are whole, or continued, or not there.

C classes, K kept classes, N pictures, V variants.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from kdfast.chain.cache_sums import meta_sum, row_sums
from kdfast.machine.disk import DiskFull, free_bytes, room_for
from kdfast.machine.files import clear_partials, sync, write_text
from kdfast.trainer.logs import LOG

FORMAT = 2
META, SUMS = "meta.json", "sums"
DTYPES = ("float16", "float32")
# Seconds of work that a power loss may cost.
FLUSH = 5.0
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """Shape and format of a cache.

    Attributes:
        dtype: Number format of the logits, one of ``DTYPES``.
        top_k: Classes kept of each row; None for all.
        temperature: Temperature at which the mass of the other classes is exact.
        length: Number of pictures, N.
        variants: Variants of each, V.
        classes: Number of classes, C; 0 until the teacher was called.
    """

    dtype: str
    top_k: int | None
    temperature: float
    length: int
    variants: int
    classes: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {DTYPES}, got {self.dtype!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: must be 1 or more, got {self.top_k}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: must be above 0 and finite, got {self.temperature}")
        if self.length < 1 or self.variants < 1:
            raise ValueError(
                f"dataset: must have items and variants, got {self.length} and {self.variants}"
            )

    @property
    def kept(self) -> int:
        """K."""
        return self.classes if self.top_k is None else min(self.top_k, self.classes)

    @property
    def partial(self) -> bool:
        """Whether classes are left out."""
        return self.kept < self.classes

    def options(self) -> dict[str, Any]:
        """What has to agree with a finished cache; the temperature only where it was used."""
        used = {"dtype": self.dtype, "length": self.length, "variants": self.variants}
        return used | {"top_k": self.top_k, "temperature": self.top_k and self.temperature}

    def arrays(self) -> dict[str, tuple[DTypeLike, tuple[int, ...]]]:
        """Type and shape of each file."""
        rows = (self.variants, self.length)
        found: dict[str, tuple[DTypeLike, tuple[int, ...]]] = {
            "values": (self.dtype, (*rows, self.kept))
        }
        if self.dtype == "float16":
            found["peak"] = (np.float32, rows)
        if self.partial:
            narrow = np.uint16 if self.classes <= 2**16 else np.uint32
            found["classes"] = (narrow, (*rows, self.kept))
            found["odds"] = (np.float32, rows)
        found[SUMS] = (np.uint32, rows)
        return found


def encode(logits: Tensor, layout: Layout) -> Arrays:
    """Rows of the files for logits (B, C) float32.

    Raises:
        ValueError: float16 cannot hold the distance of a logit to the largest of its row.
    """
    values, found = logits, {}
    if layout.partial:
        values, classes = logits.topk(layout.kept, dim=1)
        scaled = logits.double() / layout.temperature
        others = scaled.scatter(1, classes, -torch.inf).logsumexp(1)
        found["classes"] = classes.numpy()
        # Odds instead of the mass: neither rounds to 0 or 1.
        found["odds"] = (others - scaled.gather(1, classes).logsumexp(1)).numpy()
    if layout.dtype == "float16":
        peak = values.amax(1)
        values = values - peak[:, None]
        if values.min() < torch.finfo(torch.float16).min:
            raise ValueError(
                f"teacher: float16 holds logits up to 65504 below the largest, "
                f"got {float(values.min())}; use dtype='float32'"
            )
        found["peak"] = peak.numpy()
    found["values"] = values.numpy()
    return found


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
        done: (V, N) rows that are on the disk.
    """

    def __init__(self, directory: Path, key: dict[str, Any], layout: Layout) -> None:
        self.key, self.directory, self.layout = key, directory, layout
        self.partial = directory.with_name(directory.name + ".partial")
        self.done: NDArray[np.bool_] = np.zeros((layout.variants, layout.length), np.bool_)
        self._arrays: Arrays = {}
        self._done_file: Any = None
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._flushed = time.monotonic()

    def __enter__(self) -> Writer:
        """Take the lock and continue what an interrupted build left."""
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock: TextIO = (self.partial / "lock").open("w")
        try:
            # The system gives it back when the process dies, however it dies.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise BlockingIOError(
                f"teacher cache: {self.directory} is being built by another process"
            ) from error
        try:
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
                if path.name != "lock":
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
        self._check(pairs, logits)
        if not self._arrays:
            self._create(logits.shape[1])
        index, variant = np.array(pairs, np.int64).T
        for name, rows in encode(logits, self.layout).items():
            self._arrays[name][variant, index] = rows
        # Of what the files hold now, in their types.
        rows_of = {n: a[variant, index] for n, a in self._arrays.items() if n != SUMS}
        self._arrays[SUMS][variant, index] = row_sums(rows_of, variant, index)
        self._pending.append((variant, index))
        if time.monotonic() - self._flushed > FLUSH:
            self._flush()

    def _check(self, pairs: Sequence[tuple[int, int]], logits: Tensor) -> None:
        classes = self.layout.classes or (logits.shape[1] if logits.dim() == 2 else 0)
        if logits.shape != (len(pairs), classes) or not classes:
            wanted = f"({len(pairs)}, {classes or 'C'})"
            raise ValueError(f"teacher: logits must be {wanted}, got {tuple(logits.shape)}")
        bad = (~logits.isfinite()).any(1)
        if bad.any():
            index, variant = pairs[int(bad.nonzero()[0])]
            raise ValueError(
                f"teacher: logits must be finite, got {int(bad.sum())} rows that are not, "
                f"the first of index {index}, variant {variant}"
            )

    def _create(self, classes: int) -> None:
        self.layout = replace(self.layout, classes=classes)
        files = self.layout.arrays() | {"done": (np.bool_, self.done.shape)}
        for name, (dtype, shape) in files.items():
            path = self.partial / f"{name}.npy"
            with room_for(path):
                self._arrays[name] = np.lib.format.open_memmap(path, "w+", dtype, shape)
                _allocate(path)
        self.done = self._done_file = self._arrays.pop("done")
        meta = {"format": FORMAT, "key": self.key, "layout": asdict(self.layout)}
        meta["sum"] = meta_sum(meta)
        write_text(self.partial / META, json.dumps(meta, indent=1))

    def _flush(self) -> None:
        # First the rows, then that they are there: never the other way round on the disk.
        for array in self._arrays.values():
            array.flush()  # type: ignore[attr-defined]
        for rows in self._pending:
            self.done[rows] = True
        if self._pending:
            self._done_file.flush()
        self._pending, self._flushed = [], time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Keep what was written; if that is everything, put it in place."""
        try:
            self._flush()
            if kind is None:
                self._publish()
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
    for name in ("done.npy", "lock"):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(_old(directory), ignore_errors=True)
