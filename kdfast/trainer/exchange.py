# SPDX-License-Identifier: Apache-2.0
"""Gradients of several processes, averaged once all of them are known to have theirs.

DDP averages them while the backward pass still runs: a process that runs out of memory in there
would leave the others waiting for good. Here every process ends its own attempt first, then all
agree whether it worked, and only then exchange anything. The price is that the exchange no longer
hides behind the backward pass (docs/use/training.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Bytes that are sent at a time.
CHUNK = 25 * 2**20


class Agreed(NamedTuple):
    """What all processes know after an attempt.

    Attributes:
        failed: Whether memory ran out in any of them.
        largest: Images of the largest batch in any of them.
    """

    failed: bool
    largest: int


class Exchange:
    """Averages the gradients of a module over processes that all have the whole module."""

    def __init__(self, module: nn.Module, world: int, device: torch.device) -> None:
        """Set up.

        Args:
            module: The same in all processes, as are the flags of its parameters.
            world: Number of processes.
            device: Where this process tells the others how it went.
        """
        self.module, self.world, self.device = module, world, device
        self.trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        saved = module.state_dict().keys()
        self.buffers = [name for name, _ in module.named_buffers() if name in saved]
        self._packed: list[tuple[list[Tensor], Tensor]] = []
        self._reached: set[int] = set()

    def start(self) -> None:
        """Give all processes the first one's buffers, such as the statistics of batch norm."""
        buffers: list[Tensor] = [self.module.get_buffer(name) for name in self.buffers]
        for chunk in _chunks(buffers):
            flat = torch.cat([buffer.detach().reshape(-1) for buffer in chunk])
            dist.broadcast(flat, 0)
            for buffer, part in zip(chunk, _split(flat, chunk), strict=True):
                buffer.detach().copy_(part)

    def pack(self) -> None:
        """Copy the gradients to where they are averaged: what needs memory comes before ``agree``.

        Raises:
            RuntimeError: Memory ran out.
        """
        self._packed = [
            (chunk, torch.cat([_gradient(p).reshape(-1) for p in chunk]).div_(self.world))
            for chunk in _chunks(self.trained)
        ]

    def agree(self, *, failed: bool, largest: int) -> Agreed:
        """Hear how it went elsewhere; all processes call it after each attempt.

        Args:
            failed: Whether memory ran out here.
            largest: Images of the largest batch here.
        """
        # It also tells which parameters have a gradient anywhere: the others must stay without.
        has = [int(p.grad is not None) for p in self.trained]
        told = torch.tensor([int(failed), largest, *has], dtype=torch.int32, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        anywhere = told.tolist()
        self._reached = {
            id(p) for p, has in zip(self.trained, anywhere[2:], strict=True) if has
        }  # fmt: skip
        if anywhere[0]:
            self._packed = []
        return Agreed(bool(anywhere[0]), anywhere[1])

    def average(self) -> None:
        """Put the mean over the processes into every gradient that any of them has."""
        sent = [dist.all_reduce(flat, async_op=True) for _, flat in self._packed]
        for (chunk, flat), work in zip(self._packed, sent, strict=True):
            work.wait()
            for parameter, part in zip(chunk, _split(flat, chunk), strict=True):
                if id(parameter) not in self._reached:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(part)
        self._packed = []


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and of ``CHUNK`` bytes or a little more at a time."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chunk: list[Tensor] = []
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            chunk.append(tensor)
            if sum(x.numel() * x.element_size() for x in chunk) >= CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _split(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]
