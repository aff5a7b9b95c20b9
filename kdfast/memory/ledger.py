# SPDX-License-Identifier: Apache-2.0
"""Keeps the books of every tensor storage that is alive, and of the moment when they are most.

See docs/use/memory.md.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import flop_registry

from kdfast.ops._torch_private import (
    FLASH_ATTENTION,
    TorchDispatchMode,
    storage_key,
    tree_leaves,
)

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer states"
SAVED, TEMPORARIES = "saved for backward", "temporaries"
FROZEN, INPUTS = "frozen models", "inputs"
GATHERED, EXCHANGE = "gathered parameters", "exchange of gradients"
CATEGORIES = (
    *(PARAMETERS, GRADIENTS, OPTIMIZER, FROZEN, GATHERED, EXCHANGE),
    *(SAVED, TEMPORARIES, INPUTS),
)
Books = dict[tuple[str, str], int]


@dataclass
class _Entry:
    """One storage: its size after rounding, what it is for, and the module that made it."""

    size: int
    category: str
    module: str
    alive: weakref.ref[torch.UntypedStorage]


class Following(partial[None]):
    """A hook that follows which module runs; fused code need not stop for it."""

    only_follows = True


class Ledger(TorchDispatchMode):
    """Counts the storages of all tensors that ops return while the mode is on, by purpose.

    Works on fake tensors as on real ones. What a kernel allocates inside itself is not seen.

    Attributes:
        now: Bytes that are alive.
        peak: Most bytes that were alive at once.
        phase: What was going on at that moment.
        at_peak: Bytes at that moment by (category, module).
        flops: Operations of all matrix products so far.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: list[nn.Module],
        granule: int,
        absent: Collection[Tensor] = (),
    ) -> None:
        """Count the modules' own tensors.

        Args:
            student: Holds every parameter that is trained.
            teachers: Frozen modules; all that they own and make counts as theirs.
            granule: Sizes are rounded up to its multiples, as an allocator does.
            absent: Parameters that take no memory: what is there of them is added by the caller.
        """
        super().__init__()
        self.student, self.teachers, self.granule = student, teachers, granule
        self.now = self.peak = self.flops = 0
        self.phase = self._doing = "start"
        self.at_peak: Books = {}
        self._books: Counter[tuple[str, str]] = Counter()
        self._entries: dict[int, _Entry] = {}
        self._path: list[tuple[str, bool]] = []
        for tensor in absent:
            self._enter_book(tensor, 0, FROZEN, "")
        for name, tensor in (*student.named_parameters(), *student.named_buffers()):
            self.add(tensor, PARAMETERS, name.rpartition(".")[0])
        for module in teachers:
            for tensor in (*module.parameters(), *module.buffers()):
                self.add(tensor, FROZEN, "frozen")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Names what is going on."""
        before, self._doing = self._doing, phase
        yield
        self._doing = before

    def add(self, tensor: Tensor, category: str, module: str) -> None:
        """Count the storage of a tensor, unless it is counted already."""
        if storage_key(tensor) not in self._entries:
            nbytes = tensor.untyped_storage().nbytes()
            size = math.ceil(nbytes / self.granule) * self.granule
            self._enter_book(tensor, size, category, module)

    def _enter_book(self, tensor: Tensor, size: int, category: str, module: str) -> None:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        alive = weakref.ref(storage, partial(self._gone, key))
        self._entries[key] = _Entry(size, category, module, alive)
        self._books[category, module] += size
        self.now += size
        if self.now >= self.peak:
            self.peak, self.phase = self.now, self._doing
            self.at_peak = dict(self._books)

    def _gone(self, key: int, _: Any) -> None:
        entry = self._entries.pop(key)
        self._books[entry.category, entry.module] -= entry.size
        self.now -= entry.size

    def mark(self, tensor: Tensor, category: str, module: str | None = None) -> None:
        """Say what a tensor turned out to be for."""
        self.add(tensor, category, module or "")
        entry = self._entries[storage_key(tensor)]
        self._books[entry.category, entry.module] -= entry.size
        entry.category, entry.module = category, entry.module if module is None else module
        self._books[entry.category, entry.module] += entry.size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        # Torch's formulas know attention by the names it has on a GPU.
        formula = flop_registry.get(FLASH_ATTENTION.get(packet, packet))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        module, frozen = self._path[-1] if self._path else ("", False)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf, FROZEN if frozen else TEMPORARIES, module)
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follows modules, gradients and what autograd saves, until the block ends."""
        handles: list[Any] = []
        roots = [("", self.student, False), *(("frozen", m, True) for m in self.teachers)]
        for prefix, root, frozen in roots:
            for name, module in root.named_modules():
                where = (prefix if frozen else name, frozen)
                enter, leave = Following(self._enter, where), Following(self._leave)
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                owner = name.rpartition(".")[0]
                hook = partial(self._graded, owner)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
        try:
            with saved_tensors_hooks(self._pack, lambda tensor: tensor), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, where: tuple[str, bool], module: nn.Module, args: Any) -> None:
        # What runs below a frozen module is its own, also modules that both models share.
        frozen = bool(self._path) and self._path[-1][1]
        self._path.append(self._path[-1] if frozen else where)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._path.pop()

    def _graded(self, owner: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.mark(parameter.grad, GRADIENTS, owner)

    def _pack(self, tensor: Tensor) -> Tensor:
        entry = self._entries.get(storage_key(tensor))
        if entry is not None and entry.category == TEMPORARIES:
            self.mark(tensor, SAVED)
        # The tensor itself would be a cycle where a node saves its own output.
        return tensor.detach()
