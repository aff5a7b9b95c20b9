# SPDX-License-Identifier: Apache-2.0
"""Fills a teacher cache with what is missing, by all processes of a run.

The batches are the same for every number of processes and however often the work was interrupted,
as the last bits of a row may depend on the others of its batch. They are dealt in turn; after each
turn the processes tell each other how it went, so an error or a signal ends all of them.

B batch, N pictures, V variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from kdfast.chain.cache_files import Writer
from kdfast.chain.cache_rows import Layout
from kdfast.chain.cache_shards import (
    Shard,
    Written,
    left_behind,
    require_seen,
    require_whole,
    take,
)
from kdfast.data.labelled import worker_init
from kdfast.machine.ranks import Ranks
from kdfast.machine.signals import Interrupted, Signals, noting

Teacher = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]
# Times that rows are computed before the disk is given up.
PASSES = 3


@dataclass(frozen=True)
class Work:
    """What fills a cache, the same for all processes but for ``ranks``.

    Attributes:
        teacher: Logits (B, C) of images (B, 3, S, S).
        dataset: Items with "image".
        ranks: This process among all.
        batch_size: Pictures a call of the teacher.
        workers: Loader processes.
        device: Where the teacher gets its images; where its parameters are if None.
        progress: Called with pictures done by all processes and their total.
    """

    teacher: Teacher
    dataset: Dataset[Any]
    ranks: Ranks
    batch_size: int
    workers: int
    device: torch.device | str | None
    progress: Progress | None


def fill(work: Work, directory: Path, key: dict[str, Any], layout: Layout) -> None:
    """Compute every row that is missing and put the cache in its place.

    Args:
        work: What computes.
        directory: Of the cache; all processes see the same.
        key: Of the cache.
        layout: Without the number of classes.

    Raises:
        ValueError: An option is out of range, logits are not finite or of another shape, or a
            process does not see the folder.
        BlockingIOError: Another run is building it.
        PeerError: Another process failed.
        Interrupted: A signal came to one of several processes.
    """
    writer, ranks = Writer(directory, key, layout), work.ranks
    # One process alone may stop anywhere, several only together.
    alone: AbstractContextManager[Signals | None] = nullcontext()
    signals = noting() if ranks.world > 1 else alone
    with _opened(writer, ranks), _Frozen(work.teacher, work.device) as call, signals as noted:
        _take_over(writer, ranks, lambda: (Written(p.name, 0) for p in left_behind(writer)))
        for done in count():
            plan = ranks.by_main(lambda: _plan(writer, work.batch_size))
            if not plan.left:
                break
            if done == PASSES:
                raise ValueError(
                    f"teacher cache: {plan.left} batches in {writer.partial} were damaged on their "
                    f"way to the disk {PASSES} times; check the disk or name another folder"
                )
            written = _fill_once(work, writer, plan, call, noted)
            _take_over(writer, ranks, partial(iter, written))
        ranks.by_main(writer.finish)


@contextmanager
def _opened(writer: Writer, ranks: Ranks) -> Iterator[None]:
    """Context in which the first process holds the lock, and all see its folder."""
    with ExitStack() as stack:

        def enter() -> str:
            stack.enter_context(writer)
            return writer.token

        token = ranks.by_main(enter)

        def seen() -> None:
            if not ranks.main:
                require_seen(writer.directory, token)

        ranks.shared(seen)
        yield


def _take_over(writer: Writer, ranks: Ranks, shards: Callable[[], Iterator[Written]]) -> None:
    """Move the rows of shards into the cache, while the other processes wait step by step."""

    def rows() -> Iterator[int]:
        for written in shards():
            if written.rows:
                require_whole(writer.directory, written)
            path = writer.partial / written.name
            if path.is_file():
                yield from take(writer, path)

    parts = rows()
    while ranks.by_main(lambda: next(parts, None)) is not None:
        pass


@dataclass(frozen=True)
class _Plan:
    """What is to be computed.

    Attributes:
        layout: Of the cache, with its number of classes once it is known.
        flags: Bits, set where a batch has rows that are missing.
        left: How many are set.
        done: Rows of the others.
    """

    layout: Layout
    flags: bytes
    left: int
    done: int

    def batches(self, size: int) -> NDArray[np.int64]:
        """Numbers of the batches."""
        whole = math.ceil(self.layout.length * self.layout.variants / size)
        bits = np.frombuffer(self.flags, np.uint8)
        return np.flatnonzero(np.unpackbits(bits, count=whole))


def _plan(writer: Writer, size: int) -> _Plan:
    if size < 1:
        raise ValueError(f"batch_size: must be 1 or more, got {size}")
    writer.flush()
    flat = writer.done.reshape(-1)
    starts = np.arange(0, len(flat), size)
    missing = ~np.logical_and.reduceat(flat, starts)
    rows = np.minimum(starts + size, len(flat)) - starts
    return _Plan(
        writer.layout,
        np.packbits(missing).tobytes(),
        int(missing.sum()),
        len(flat) - int(rows[missing].sum()),
    )


def _fill_once(
    work: Work,
    writer: Writer,
    plan: _Plan,
    call: Callable[[Tensor], Tensor],
    signals: Signals | None,
) -> list[Written]:
    """Compute the batches of a plan; the shards that hold what is not in the cache yet."""
    ranks, layout = work.ranks, plan.layout
    mine = _Batches(plan.batches(work.batch_size)[ranks.rank :: ranks.world], work, layout)
    most = len(mine) * work.batch_size
    shard = Shard(writer.directory, writer.key, layout, rank=ranks.rank, rows=most)
    sink: Writer | Shard = writer if ranks.main else shard
    steps = _steps(work, mine)

    def step() -> tuple[int, int]:
        pairs, images = next(steps, ([], None))
        if images is not None:
            sink.write(pairs, call(images))
        return len(pairs), 0 if signals is None else signals.caught

    done, total = plan.done, layout.length * layout.variants
    try:
        for _ in range(math.ceil(plan.left / ranks.world)):
            answers = ranks.shared(step)
            if caught := max(caught for _, caught in answers):
                raise Interrupted(caught)
            done += sum(rows for rows, _ in answers)
            if work.progress is not None:
                work.progress(done, total)
    except BaseException:
        shard.close()
        raise
    return ranks.shared(shard.close)


def _steps(work: Work, batches: _Batches) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """Pairs (index, variant) and images of each batch."""
    loader = DataLoader(
        _Pairs(work.dataset),
        batch_sampler=batches,
        num_workers=work.workers,
        collate_fn=_images,
        worker_init_fn=worker_init,
        # Its own generator: the loader would draw from the global one otherwise.
        generator=torch.Generator(),
    )
    yield from zip(batches, loader, strict=True)


class _Pairs(Dataset[Any]):
    """A dataset asked for pairs, whether it has variants or not."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.paired = hasattr(dataset, "variants")

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Any:
        places = pairs if self.paired else [index for index, _ in pairs]
        many = getattr(self.dataset, "__getitems__", None)
        return [self.dataset[place] for place in places] if many is None else many(places)


class _Batches(Sampler[list[tuple[int, int]]]):
    """Batches of pairs (index, variant), by their numbers."""

    def __init__(self, numbers: NDArray[np.int64], work: Work, layout: Layout) -> None:
        self.numbers, self.size = numbers, work.batch_size
        self.length, self.total = layout.length, layout.length * layout.variants

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in self.numbers.tolist():
            rows = range(number * self.size, min((number + 1) * self.size, self.total))
            yield [(row % self.length, row // self.length) for row in rows]

    def __len__(self) -> int:
        return len(self.numbers)


def _images(items: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.stack([item["image"] for item in items])


class _Frozen:
    """The teacher as a function without gradients; a module's modes are put back at the end."""

    def __init__(self, teacher: Teacher, device: torch.device | str | None) -> None:
        self.teacher = teacher
        modules = list(teacher.modules()) if isinstance(teacher, nn.Module) else []
        self.modes = [(module, module.training) for module in modules]
        if device is None and isinstance(teacher, nn.Module):
            device = next((p.device for p in teacher.parameters()), None)
        self.device = torch.device("cpu" if device is None else device)

    def __enter__(self) -> Callable[[Tensor], Tensor]:
        for module, _ in self.modes:
            module.training = False
        return self._call

    def __exit__(self, *_: object) -> None:
        for module, training in self.modes:
            module.training = training

    @torch.no_grad()
    def _call(self, images: Tensor) -> Tensor:
        return self.teacher(images.to(self.device, non_blocking=True)).float().cpu()
