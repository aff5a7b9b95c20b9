# SPDX-License-Identifier: Apache-2.0
"""Gradients averaged over processes while the backward pass runs, also where one has no memory.

DDP does the first half. A process that runs out of memory in the middle of its backward would leave
the others waiting in there for good, and DDP cannot be asked to end such a step.

Here every attempt at a step has the same collectives in the same order in every process, whatever
happens in it: gradients leave in buckets, bucket after bucket, and then all tell each other how it
went. Hooks send a bucket as soon as it and all before it are full; what an attempt did not come to
send, because it failed or because nothing reached a parameter, ``finish`` sends as it is. Where one
attempt failed, all are thrown away. Nothing is allocated on the way: buckets are made beforehand,
and gradients are views of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Bytes that are sent at a time.
BUCKET = 25 * 2**20


class Agreed(NamedTuple):
    """What all processes know after an attempt.

    Attributes:
        failed: Whether memory ran out in any of them.
        largest: Images of the largest batch in any of them.
    """

    failed: bool
    largest: int


class _Bucket:
    """Tensors of one dtype, side by side in one that can be sent.

    Attributes:
        tensors: Those that it is for.
        flat: (N,), of as many numbers as they have.
        views: A part of ``flat`` for each of them, in its shape and order in memory.
        missing: How many of them are still to come before it is full.
        work: What sends it; None: it was not sent yet.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        sizes = [x.numel() for x in tensors]
        self.tensors = tensors
        self.flat = torch.zeros(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
        parts = self.flat.split(sizes)
        self.views = [_as(x, part) for part, x in zip(parts, tensors, strict=True)]
        self.missing = len(tensors)
        self.work: dist.Work | None = None

    def broadcast(self) -> None:
        """Give all processes the first one's tensors."""
        for view, tensor in zip(self.views, self.tensors, strict=True):
            view.copy_(tensor.detach())
        dist.broadcast(self.flat, 0)
        for view, tensor in zip(self.views, self.tensors, strict=True):
            tensor.detach().copy_(view)


class Exchange:
    """Averages the gradients of a module over processes that all have the whole module.

    For each attempt at a step every process calls ``begin``, perhaps ``sending`` around its last
    backward, and ``finish``.
    """

    def __init__(self, module: nn.Module, world: int, device: torch.device) -> None:
        """Give all processes the first one's module; all have to call it.

        Args:
            module: Of the same shapes in all processes, with the same parameters to train. It is on
                its device, and stays there.
            world: Number of processes.
            device: Where this process tells the others how it went.
        """
        self.world = world
        # Backward passes reach the last layers first.
        trained = [p for p in module.parameters() if p.requires_grad][::-1]
        saved = module.state_dict().keys()
        kept = [x for name, x in module.named_buffers() if name in saved]
        for some in _buckets([*module.parameters(), *kept]):
            _Bucket(some).broadcast()
        self._buffers = [_Bucket(some) for some in _buckets(kept)]
        self._buckets = [_Bucket(some) for some in _buckets(trained)]
        self._place = {p: i for i, p in enumerate(p for b in self._buckets for p in b.tensors)}
        self._reached = [0] * len(self._place)
        self._told = torch.zeros(2 + len(self._place), dtype=torch.int32, device=device)
        self._sent, self._sending = 0, False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket))
            for bucket in self._buckets
            for parameter in bucket.tensors
        ]

    def close(self) -> None:
        """Let go of the module; a step cannot follow."""
        for hook in self._hooks:
            hook.remove()
        self._buckets, self._buffers, self._hooks, self._place = [], [], [], {}

    def share_buffers(self) -> None:
        """Give all processes the first one's buffers, such as the statistics of batch norm."""
        for bucket in self._buffers:
            bucket.broadcast()

    def begin(self) -> None:
        """Set all gradients to zero before an attempt."""
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.work, bucket.missing = None, len(bucket.tensors)
            for parameter, view in zip(bucket.tensors, bucket.views, strict=True):
                parameter.grad = view
        self._reached = [0] * len(self._place)
        self._sent, self._sending = 0, False

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Context of the last backward of an attempt: what it completes may leave."""
        self._sending = True
        try:
            yield
        finally:
            self._sending = False

    def finish(self, *, failed: bool, largest: int) -> Agreed:
        """End an attempt: the mean over the processes is in every gradient that any of them has.

        Where an attempt failed, no process has gradients afterwards.

        Args:
            failed: Whether memory ran out here.
            largest: Images of the largest batch here.
        """
        for bucket in self._buckets[self._sent :]:
            self._send(bucket)
        # Parameters without a gradient in any process must stay without, or optimisers move them.
        self._told.copy_(torch.tensor([int(failed), largest, *self._reached], dtype=torch.int32))
        dist.all_reduce(self._told, dist.ReduceOp.MAX)
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
        any_failed, most, *reached = self._told.tolist()
        for parameter, place in self._place.items():
            if any_failed or not reached[place]:
                parameter.grad = None
        return Agreed(bool(any_failed), most)

    def _arrived(self, bucket: _Bucket, parameter: Tensor) -> None:
        """A backward is through with a parameter."""
        self._reached[self._place[parameter]] = 1
        if not self._sending:
            return
        if bucket.work is not None:
            raise RuntimeError(
                f"exchange: a parameter of shape {tuple(parameter.shape)} got gradients several "
                "times in one backward, after they were sent; checkpointing with use_reentrant=True"
                " does that"
            )
        bucket.missing -= 1
        while self._sent < len(self._buckets) and self._buckets[self._sent].missing <= 0:
            self._send(self._buckets[self._sent])

    def _send(self, bucket: _Bucket) -> None:
        bucket.flat.div_(self.world)
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        self._sent += 1


def _as(tensor: Tensor, part: Tensor) -> Tensor:
    """A part of a bucket in the shape and strides of a tensor; of one with gaps, contiguous.

    Fused optimisers go through parameters and gradients in the order of memory.
    """
    strides = torch.empty_like(tensor, device="meta").stride()
    return part.as_strided(tensor.shape, strides, part.storage_offset())


def _buckets(tensors: Iterable[Any]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and of ``BUCKET`` bytes or a little more at a time."""
    open_ones: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = open_ones.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(x.numel() * x.element_size() for x in bucket) >= BUCKET:
            yield open_ones.pop(tensor.dtype)
    yield from open_ones.values()
