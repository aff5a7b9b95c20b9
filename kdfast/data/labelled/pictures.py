# SPDX-License-Identifier: Apache-2.0
"""Pictures of a classification set: read, resized once, and kept in memory where they fit."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional as F

from kdfast.data.corrupt import LOG, Corrupt, CorruptCounter, Unreadable
from kdfast.data.files import CorruptDataError, decode_bgr

# Readers give a picture, or say why its bytes are none.
Read = Tensor | str
# Pictures that are asked to stand in for one that cannot be read.
TRIES = 32
# Pictures that are asked for at once when all are read.
TOGETHER = 16


class Source(Protocol):
    """Where pictures come from, by row number."""

    def __len__(self) -> int:
        """Number of rows."""

    def read(self, rows: Sequence[int]) -> Sequence[Read]:
        """The pictures of rows, (1 or 3, h, w) uint8 each; or why there is none."""

    def where(self, row: int) -> str:
        """Where a row is, for messages."""

    def stamp(self, row: int) -> str:
        """Text that differs when the picture of a row does; made without decoding the picture."""


class ArraySource:
    """Pictures of one array.

    Attributes:
        array: (N, h, w) or (N, h, w, 3) uint8.
    """

    def __init__(self, array: NDArray[np.uint8], name: str) -> None:
        if array.dtype != np.uint8:
            raise TypeError(f"{name}: pictures must be uint8, got {array.dtype}")
        if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
            raise ValueError(
                f"{name}: pictures must be (N, h, w) or (N, h, w, 3), got {array.shape}"
            )
        self.array = array if array.ndim == 4 else array[..., None]
        self.name = name

    def __len__(self) -> int:
        return len(self.array)

    def where(self, row: int) -> str:
        """See ``Source``."""
        return f"{self.name}: row {row}"

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """See ``Source``."""
        # A copy: arrays read from files are not writable, which tensors cannot express.
        return [torch.from_numpy(self.array[row].copy()).permute(2, 0, 1) for row in rows]

    def stamp(self, row: int) -> str:
        """See ``Source``; pictures that do not change on disk are named by their bytes."""
        return hashlib.sha256(np.ascontiguousarray(self.array[row]).data).hexdigest()


class EncodedSource(ABC):
    """Pictures of image files, wherever their bytes are.

    Attributes:
        names: Names of the files, for messages.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    @abstractmethod
    def fetch(self, rows: Sequence[int]) -> list[bytes | Unreadable]:
        """The bytes of the files of rows, or why they are not those of a picture.

        Raises:
            OSError: One cannot be opened.
        """

    def where(self, row: int) -> str:
        """See ``Source``."""
        return self.names[row]

    @abstractmethod
    def stamp(self, row: int) -> str:
        """See ``Source``."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: Sequence[int]) -> list[Read]:
        """See ``Source``; three channels, EXIF rotation ignored.

        Raises:
            OSError: A file cannot be opened.
        """
        if get_worker_info() is not None:
            # OpenCV's thread pool does not survive a fork.
            cv2.setNumThreads(0)
        return [_decoded(data) for data in self.fetch(rows)]


def _decoded(data: bytes | Unreadable) -> Read:
    image = str(data) if isinstance(data, Unreadable) else decode_bgr(data)
    if isinstance(image, str):
        return image
    return torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)


@dataclass(frozen=True)
class Part:
    """One split before it is resized.

    Attributes:
        source: The pictures.
        rows: (M,) rows of the source that belong to it.
        targets: (M,) int64, or (M, C) float32 for several labels.
    """

    source: Source
    rows: NDArray[np.int64]
    targets: Tensor

    @classmethod
    def whole(cls, source: Source, targets: NDArray[np.generic] | Tensor) -> Part:
        """All rows of a source."""
        targets = torch.as_tensor(targets)
        if len(targets) != len(source):
            raise ValueError(
                f"labels: there must be one for each of {len(source)} pictures, got {len(targets)}"
            )
        return cls(source, np.arange(len(source)), targets)

    def take(self, chosen: NDArray[np.int64]) -> Part:
        """The rows at these positions."""
        return Part(self.source, self.rows[chosen], self.targets[torch.from_numpy(chosen)])

    def __len__(self) -> int:
        return len(self.rows)


class Store:
    """The pictures of a split, short side resized, in one uint8 buffer or read every time.

    Attributes:
        held: Whether the pictures are in memory; items are the same either way.
        digest: Hash of the pictures and targets; of names, sizes and dates where not held.
    """

    # Neighbours are often damaged together: far ones are asked next.
    GOLDEN = 0.6180339887

    def __init__(
        self, part: Part, short: int, budget: int, interpolation: str = "bilinear"
    ) -> None:
        """Read and resize all pictures, unless that takes more than ``budget`` bytes.

        Args:
            part: The pictures.
            short: Side in pixels that the shorter side of a picture gets.
            budget: Bytes that they may take in memory.
            interpolation: "nearest", "bilinear" or "bicubic", antialiased.

        Raises:
            CorruptDataError: Too many of the pictures that are read now cannot be read.
            OSError: One cannot be opened.
        """
        self.short = short
        self._interpolation = F.InterpolationMode(interpolation)
        self.length = len(part)
        self._shapes = np.zeros((len(part), 3), np.int64)
        self._offsets = np.zeros(len(part) + 1, np.int64)
        self._corrupt: dict[int, Corrupt] = {}
        buffer = self._fill(part, budget)
        self.held = buffer is not None
        self._buffer = torch.empty(0, dtype=torch.uint8) if buffer is None else buffer
        # Workers started by spawn get a copy of all that hangs on the dataset: only the needed.
        self._part = None if self.held else part
        self.digest = self._digest(part)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor | Corrupt:
        """``many`` of one."""
        return self.many([index])[0]

    def many(self, indices: Sequence[int]) -> list[Tensor | Corrupt]:
        """(1 or 3, h, w) uint8 with the short side of the store, or why one cannot be read.

        Raises:
            OSError: One cannot be opened.
        """
        if self._part is not None:
            return self._resized(self._part, indices)
        return [self._kept(index) for index in indices]

    def _kept(self, index: int) -> Tensor | Corrupt:
        if index in self._corrupt:
            return self._corrupt[index]
        start, end = self._offsets[index : index + 2].tolist()
        channels, height, width = self._shapes[index].tolist()
        return self._buffer[start:end].view(channels, height, width)

    def stand_in(self, index: int) -> tuple[int, Tensor]:
        """Another picture for one that cannot be read, the same one every time, and its index.

        Raises:
            CorruptDataError: Many cannot be read.
            OSError: One cannot be opened.
        """
        step = int(self.length * self.GOLDEN) | 1
        while math.gcd(step, self.length) > 1:
            step += 2
        for n in range(1, min(self.length, TRIES + 1)):
            other = (index + n * step) % self.length
            image = self[other]
            if not isinstance(image, Corrupt):
                return other, image
        raise CorruptDataError(
            f"pictures: at least one of {min(self.length, TRIES + 1)} must be readable to stand in "
            f"for item {index}, got none"
        )

    def _resized(self, part: Part, indices: Sequence[int]) -> list[Tensor | Corrupt]:
        rows = [int(part.rows[index]) for index in indices]
        found: list[Tensor | Corrupt] = []
        for index, row, image in zip(indices, rows, part.source.read(rows), strict=True):
            if isinstance(image, str):
                found.append(Corrupt(index, part.source.where(row), image))
                continue
            if min(image.shape[-2:]) != self.short:
                image = F.resize(image, [self.short], self._interpolation, antialias=True)
            found.append(image)
        return found

    def _every(self, part: Part) -> Iterator[Tensor | Corrupt]:
        """All pictures, some at a time, which are under way together where they are far."""
        for start in range(0, self.length, TOGETHER):
            yield from self._resized(part, range(start, min(start + TOGETHER, self.length)))

    def _fill(self, part: Part, budget: int) -> Tensor | None:
        buffer, end = torch.empty(0, dtype=torch.uint8), 0
        counter = CorruptCounter(self.length, quiet=True)
        for index, image in enumerate(self._every(part)):
            if isinstance(image, Corrupt):
                counter.add(0, [(image.path, image.reason)])
                self._corrupt[index] = image
                self._offsets[index + 1] = end
                continue
            counter.add(1, [])
            start, end = end, end + image.numel()
            if end > len(buffer):
                # Pictures of one set have mostly one size: what is left takes about as much.
                size = end + image.numel() * (self.length - index - 1)
                if size > budget:
                    return None
                buffer = torch.cat([buffer, torch.empty(size - len(buffer), dtype=torch.uint8)])
            buffer[start:end] = image.reshape(-1)
            self._shapes[index] = image.shape
            self._offsets[index + 1] = end
        if self._corrupt:
            first = next(iter(self._corrupt.values()))
            LOG.warning(
                "%d of %d pictures cannot be read: %s: %s%s",
                *(len(self._corrupt), self.length, first.path, first.reason),
                ", and others" if len(self._corrupt) > 1 else "",
            )
        return buffer[:end]

    def _digest(self, part: Part) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(part.targets.numpy()).data)
        if not self.held:
            for row in part.rows.tolist():
                digest.update(part.source.stamp(row).encode())
        else:
            digest.update(self._shapes.data)
            digest.update(self._buffer.numpy().data)
        return digest.hexdigest()
