# SPDX-License-Identifier: Apache-2.0
"""Teacher logits of every picture and variant, computed once. See docs/use/teacher_cache.md.

B batch, C classes, K kept classes, N pictures, V variants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.chain.cache_build import Progress, Teacher, Work, fill
from kdfast.chain.cache_files import read_files, tidy
from kdfast.chain.cache_key import as_json, check_key, model_hash, teacher_key
from kdfast.chain.cache_rows import SUMS, Layout
from kdfast.chain.cache_shards import eventually, not_shared
from kdfast.chain.cache_sums import row_sums
from kdfast.machine.ranks import Ranks
from kdfast.trainer.logs import LOG

__all__ = ["TeacherCache", "model_hash", "teacher_key"]

# Rows that ``verify`` reads at once.
VERIFIED = 4096


class TeacherCache:
    """Logits of a frozen teacher for a dataset whose items can be replayed.

    Attributes:
        directory: Where it is.
        key: What it follows from.
        layout: Sizes, number format, kept classes and their temperature.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open whatever is in a folder; ``open`` also checks what it follows from.

        Raises:
            FileNotFoundError: There is no finished cache.
            ValueError: It is broken or of another format.
        """
        self.directory = Path(directory)
        self.key, self.layout, self._files = read_files(self.directory)

    @classmethod
    def open(cls, directory: str | Path, key: Mapping[str, Any]) -> TeacherCache:
        """Open a finished cache.

        Args:
            directory: Where it was built.
            key: What its logits have to follow from; see ``teacher_key``.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It follows from something else (the message says from what), or is broken.
        """
        cache = cls(directory)
        check_key(cache.directory, cache.key, key)
        return cache

    @classmethod
    def build(
        cls,
        teacher: Teacher,
        dataset: Dataset[Any],
        directory: str | Path,
        *,
        key: Mapping[str, Any],
        top_k: int | None = None,
        temperature: float = 4.0,
        dtype: str = "float16",
        batch_size: int = 64,
        workers: int = 0,
        device: torch.device | str | None = None,
        rebuild: bool = False,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
    ) -> TeacherCache:
        """Compute what is missing and open the cache.

        A finished cache of the same key and options is opened as it is; one that was interrupted
        is continued, also by another number of processes. The global random state stays as it is.

        Args:
            teacher: Logits (B, C) of images (B, 3, S, S). A module runs in evaluation mode.
            dataset: Items with "image". With an attribute ``variants`` it is asked for pairs
                (index, variant), otherwise for indices.
            directory: For this cache alone; ``directory`` + ".partial" while it is built.
            key: What the logits follow from, as JSON types; see ``teacher_key``.
            top_k: Keep the logits of the K most probable classes and the mass of the rest; None
                keeps all. Not for several labels.
            temperature: At which the mass of the rest is exact; unused if all are kept.
            dtype: "float16" or "float32"; docs/use/teacher_cache.md has the rounding.
            batch_size: Pictures a call of the teacher.
            workers: Processes that make the pictures.
            device: Where the teacher gets its images; where its parameters are if None.
            rebuild: Replace a finished cache of another key or options instead of raising.
            progress: Called with pictures done by all processes and their total.
            ranks: The processes that fill the cache together and all call this, with the same
                arguments: ``Ranks.here()``. None: this one alone.

        Raises:
            ValueError: The folder has a cache of something else, an option is out of range, the
                teacher's logits are not finite or not (B, C), or the folder is not one that all
                processes share.
            BlockingIOError: Another run is building it.
            PeerError: Another process failed; that one raised what is in the message.
        """
        ranks = ranks or Ranks()
        length = len(dataset)  # type: ignore[arg-type]
        options = Layout(dtype, top_k, temperature, length, getattr(dataset, "variants", 1))
        directory = Path(directory)
        work = Work(teacher, dataset, ranks, batch_size, workers, device, progress)
        if not ranks.by_main(lambda: _finished(directory, key, options, rebuild)):
            fill(work, directory, as_json(key), options)
        found: list[TeacherCache] = []
        ranks.shared(lambda: found.append(_seen(directory, key) if ranks.rank else cls(directory)))
        return found[0]

    def logits(
        self, index: Tensor | Sequence[int], variant: Tensor | Sequence[int] | int
    ) -> Tensor:
        """Teacher logits of items.

        Args:
            index: (B,) positions in the dataset.
            variant: (B,) of each item, or one for all.

        Returns:
            (B, C) float32 on the CPU. With K kept classes the others share one value, so that
            their softmax at ``temperature`` sums to the teacher's.

        Raises:
            IndexError: An index or variant is out of range.
            ValueError: A row is damaged.
        """
        rows = self._read(*self._rows(index, variant))
        values = torch.from_numpy(rows["values"]).float()
        if "peak" in rows:
            values += torch.from_numpy(rows["peak"])[:, None]
        if "odds" not in rows:
            return values
        classes = torch.from_numpy(rows["classes"].astype(np.int64))
        spread = self._spread(values, torch.from_numpy(rows["odds"]))
        return spread[:, None].repeat(1, self.layout.classes).scatter_(1, classes, values)

    def rest(self, index: Tensor | Sequence[int], variant: Tensor | Sequence[int] | int) -> Tensor:
        """Probability (B,) float32 of all classes that are not kept, at ``temperature``."""
        rows = self._read(*self._rows(index, variant))
        if "odds" not in rows:
            return torch.zeros(len(rows["values"]))
        return torch.from_numpy(rows["odds"]).sigmoid()

    def verify(self, ranks: Ranks | None = None) -> None:
        """Compares every row with its checksum: the files are read once.

        Args:
            ranks: The processes that share the work and all call this; None: this one alone.

        Raises:
            ValueError: A row is damaged.
            PeerError: Another process found one.
        """
        ranks = ranks or Ranks()
        ranks.shared(lambda: self._verify(ranks))

    def _verify(self, ranks: Ranks) -> None:
        total = self.layout.variants * self.layout.length
        for start in range(ranks.rank * VERIFIED, total, ranks.world * VERIFIED):
            rows = np.arange(start, min(start + VERIFIED, total))
            self._read(*np.divmod(rows, self.layout.length))

    def _read(
        self, variant: NDArray[np.int64], index: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """What the files hold of rows, compared with their checksums."""
        rows = {name: array[variant, index] for name, array in self._files.items()}
        sums = rows.pop(SUMS)
        wrong = np.flatnonzero(sums != row_sums(rows, variant, index))
        if wrong.size:
            files = ", ".join(f"{name}.npy" for name in [*rows, SUMS])
            raise ValueError(
                f"teacher cache: {self.directory} is damaged: index {index[wrong[0]]}, variant "
                f"{variant[wrong[0]]} does not match its checksum in one of {files}; delete the "
                f"folder, or build it with rebuild=True"
            )
        return rows

    def _spread(self, values: Tensor, odds: Tensor) -> Tensor:
        layout = self.layout
        others = layout.classes - values.shape[1]
        kept = (values.double() / layout.temperature).logsumexp(1)
        return (layout.temperature * (kept + odds.double() - math.log(others))).float()

    def _rows(
        self, index: Tensor | Sequence[int], variant: Tensor | Sequence[int] | int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        column = torch.as_tensor(index).cpu().numpy()
        row = np.broadcast_to(torch.as_tensor(variant).cpu().numpy(), column.shape)
        for name, numbers, end in (
            ("index", column, self.layout.length),
            ("variant", row, self.layout.variants),
        ):
            # numpy would count negative ones from the end.
            if numbers.size and not (0 <= numbers.min() and numbers.max() < end):
                raise IndexError(
                    f"{name}: must be in [0, {end}), got {numbers.min()} to {numbers.max()}"
                )
        return row, column

    def __reduce__(self) -> tuple[type[TeacherCache], tuple[Path]]:
        """Processes open the files themselves instead of receiving their content."""
        return TeacherCache, (self.directory,)


def _finished(directory: Path, key: Mapping[str, Any], options: Layout, rebuild: bool) -> bool:
    """Whether there is a finished cache of this key and these options, or else it is built."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        cache = TeacherCache(directory)
        check_key(directory, cache.key, key)
        check_key(directory, cache.layout.options(), options.options())
    except ValueError as error:
        if not rebuild:
            raise
        LOG.info("the teacher cache is built again: %s", error)
        return False
    tidy(directory)
    return True


def _seen(directory: Path, key: Mapping[str, Any]) -> TeacherCache:
    """The cache that another process put in place.

    Raises:
        ValueError: It is not seen here.
    """
    found: list[TeacherCache] = []

    def there() -> bool:
        try:
            found.append(TeacherCache.open(directory, key))
        except (FileNotFoundError, ValueError):  # what was there before, or only parts yet
            return False
        return True

    if not eventually(there):
        raise ValueError(not_shared(directory))
    return found[-1]
