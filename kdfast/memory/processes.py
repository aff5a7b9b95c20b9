# SPDX-License-Identifier: Apache-2.0
"""What training on several processes adds to the memory of each, or takes away from it.

Run beside a step under a ``Ledger``: what FSDP2 or ``trainer/exchange.py`` would hold is held here,
at the same moments, by tensors of the same sizes. Nothing is exchanged. See docs/use/memory.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.memory.ledger import (
    EXCHANGE,
    FROZEN,
    GATHERED,
    GRADIENTS,
    PARAMETERS,
    Following,
    Ledger,
)
from kdfast.models.eva import EVAViT
from kdfast.ops._torch_private import tree_leaves
from kdfast.pruning.blocks import blocks_of


class Unit:
    """Parameters that are gathered together: a block, or what lies around a model's blocks.

    Attributes:
        module: Whose forward they are gathered for.
        parameters: All of them, as they are when gathered.
        reshard: Whether they are let go after a forward.
    """

    def __init__(self, module: nn.Module, taken: set[Tensor], reshard: bool, count: int) -> None:
        """Take the parameters of a module that no unit has yet.

        Args:
            module: The module.
            taken: Parameters of other units; those of this one are added.
            reshard: Whether they are let go after a forward.
            count: Number of processes.
        """
        self.module, self.reshard, self._count = module, reshard, count
        self.parameters = [p for p in module.parameters() if p not in taken]
        taken.update(self.parameters)
        self.shards: dict[Tensor, nn.Parameter] = {
            p: nn.Parameter(self._shard(p), p.requires_grad) for p in self.parameters
        }
        self.wanted = sum(p.requires_grad for p in self.parameters)
        self.out: list[Tensor] = []
        self.flat: Tensor | None = None
        self.graded = 0

    def _shard(self, parameter: Tensor) -> Tensor:
        """What one process holds of a parameter: rows, rounded up."""
        shape = list(parameter.shape) or [1]
        shape[0] = math.ceil(shape[0] / self._count)
        return torch.empty(shape, dtype=parameter.dtype)

    def whole(self, parameter: Tensor) -> Tensor:
        """Room for a parameter, or for its gradient, in the pieces of all processes."""
        return torch.empty(self.shards[parameter].numel() * self._count, dtype=parameter.dtype)

    def buffer(self, parameters: Sequence[Tensor]) -> Tensor:
        """Room for parameters in one piece, as they are sent and received."""
        sizes = [self.shards[p].numel() * self._count * p.element_size() for p in parameters]
        return torch.empty(sum(sizes), dtype=torch.uint8)


class _AroundTrace:
    """Calls hooks of a forward around ``EVAViT.trace``, too, which is no module's forward."""

    def __init__(self, model: EVAViT, enter: Any, leave: Any) -> None:
        self.model, trace = model, model.trace

        def traced(*args: Any, **kwargs: Any) -> Any:
            enter(model, args)
            output = trace(*args, **kwargs)
            leave(model, args, output)
            return output

        model.__dict__["trace"] = traced

    def remove(self) -> None:
        """Put the method back."""
        del self.model.__dict__["trace"]


class Shards:
    """Holds what FSDP2 holds, at the moments when it does.

    Attributes:
        units: Those of student and teachers.
    """

    def __init__(self, student: nn.Module, teachers: Sequence[nn.Module], count: int) -> None:
        """Divide the models into units.

        Args:
            student: Holds every parameter that is trained; its models' blocks are units.
            teachers: Frozen models, each with blocks of its own.
            count: Number of processes.
        """
        taken: set[Tensor] = set()
        self.units: list[Unit] = []
        self._roots: set[nn.Module] = set()
        for model, frozen in ((_trained(student), False), *((t, True) for t in teachers)):
            blocks = _blocks(model, frozen)
            if blocks is None:
                continue  # a head stays whole
            for block in blocks:
                self.units.append(Unit(block, taken, True, count))
            self.units.append(Unit(model, taken, frozen, count))
            self._roots.add(model)
        for part in student.modules():
            if any(p not in taken for p in part.parameters(recurse=False)):
                self.units.append(Unit(part, taken, False, count))
                self._roots.add(part)
        self.units = [unit for unit in self.units if unit.parameters]
        self._order: list[Unit] = []
        self._ahead: Unit | None = None
        self._sent: Tensor | None = None
        self._backward = False

    @property
    def absent(self) -> list[Tensor]:
        """The parameters, of which each process holds a shard only."""
        return [p for unit in self.units for p in unit.parameters]

    def optimize(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimiser that has no states yet work on the shards."""
        shards = {p: shard for unit in self.units for p, shard in unit.shards.items()}
        for group in optimizer.param_groups:
            group["params"] = [shards[p] for p in group["params"]]

    @contextmanager
    def watching(self, ledger: Ledger) -> Iterator[None]:
        """Follows the units of the step until the block ends."""
        self.ledger = ledger
        handles: list[Any] = []
        for unit in self.units:
            for parameter, shard in unit.shards.items():
                ledger.add(shard, PARAMETERS if parameter.requires_grad else FROZEN, "")
            enter = Following(partial(self._enter, unit))
            leave = Following(partial(self._leave, unit))
            handles.append(unit.module.register_forward_pre_hook(enter, prepend=True))
            handles.append(unit.module.register_forward_hook(leave))
            if isinstance(unit.module, EVAViT):
                handles.append(_AroundTrace(unit.module, enter, leave))
            for parameter in unit.parameters:
                if parameter.requires_grad:
                    hook = partial(self._graded, unit)
                    handles.append(parameter.register_post_accumulate_grad_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> None:
        """End a backward: what no gradient reached is let go, and all gradients are shards."""
        for unit in self.units:
            if unit.graded:
                self._reduce(unit)
            unit.out, unit.flat = [], None
        self._order, self._ahead, self._sent, self._backward = [], None, None, False

    def _hold(self, tensor: Tensor, category: str) -> Tensor:
        self.ledger.mark(tensor, category, "")
        return tensor

    def _enter(self, unit: Unit, module: nn.Module, args: Any) -> None:
        if self._backward or unit.out:
            return  # recomputed: gathered by the backward
        unit.flat = self._hold(unit.buffer(unit.parameters), GATHERED)
        if self._ahead is not None:
            self._ahead.flat = None
        self._copy_out(unit)
        # It is kept until the next one has come, so that both may overlap.
        self._ahead = unit

    def _copy_out(self, unit: Unit) -> None:
        unit.out = [self._hold(unit.whole(p), GATHERED) for p in unit.parameters]

    def _leave(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> None:
        if self._backward:
            return
        if unit.reshard:
            unit.out = []
        if module in self._roots and self._ahead is not None:
            self._ahead.flat = None
            self._ahead = None
        if torch.is_grad_enabled():
            self._order.append(unit)
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(partial(self._begin, unit))

    def _begin(self, unit: Unit, grad: Tensor) -> None:
        """The backward of a unit: it is gathered, and the one that comes next is sent for."""
        self._backward = True
        if unit not in self._order:
            return
        place = self._order.index(unit)
        del self._order[place:]
        if not unit.out:
            if unit.flat is None:
                unit.flat = self._hold(unit.buffer(unit.parameters), GATHERED)
            self._copy_out(unit)
            unit.flat = None
        if place and not self._order[-1].out:
            ahead = self._order[-1]
            ahead.flat = self._hold(ahead.buffer(ahead.parameters), GATHERED)

    def _graded(self, unit: Unit, parameter: Tensor) -> None:
        unit.graded += 1
        if unit.graded == unit.wanted:
            self._reduce(unit)

    def _reduce(self, unit: Unit) -> None:
        """Gradients become shards: all of them are copied into one piece, which is sent."""
        graded = [p for p in unit.parameters if p.grad is not None]
        unit.out, unit.graded = [], 0
        self._sent = None
        self._sent = self._hold(unit.buffer(graded), EXCHANGE)
        for parameter in graded:
            parameter.grad = None
            shard = unit.shards[parameter]
            shard.grad = self._hold(torch.empty_like(shard), GRADIENTS)


def _trained(student: nn.Module) -> nn.Module:
    """The model in an objective that holds most of what is trained."""
    inner: Any = getattr(student, "student", student)
    return inner if isinstance(inner, nn.Module) else student


def _blocks(model: nn.Module, frozen: bool) -> list[nn.Module] | None:
    try:
        return blocks_of(model)
    except TypeError as error:
        if frozen:
            return None
        raise ValueError(f"plan: shard fsdp must know the blocks of a model: {error}") from error


class Copies:
    """Holds gradients as processes with whole models do: in the buckets that are sent, for good."""

    def __init__(self, student: nn.Module) -> None:
        """Make the buckets.

        Args:
            student: Holds every parameter that is trained.
        """
        self.gradients = {p: torch.empty_like(p) for p in student.parameters() if p.requires_grad}

    def begin(self) -> None:
        """Let a backward add to them."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
