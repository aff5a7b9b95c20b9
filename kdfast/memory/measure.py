# SPDX-License-Identifier: Apache-2.0
"""The memory of one training step, on fake tensors. See docs/use/memory.md. B batch, C classes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.memory.cuda_rules import as_on_cuda
from kdfast.memory.ledger import (
    CATEGORIES,
    GRADIENTS,
    INPUTS,
    OPTIMIZER,
    PARAMETERS,
    Books,
    Ledger,
)
from kdfast.memory.processes import Copies, Shards
from kdfast.models.eva import EVAViT
from kdfast.ops._torch_private import FakeTensorMode
from kdfast.ops.kd_loss import kd_loss

MIB, GIB = 2**20, 2**30
# What a process needs on a GPU besides tensors: the context with its kernels, and the workspaces
# of cuBLAS and cuDNN. Not measured here: the first is 300 to 500 MiB on recent cards.
CONTEXT, WORKSPACE = 512 * MIB, 64 * MIB
# Part of the peak that the caching allocator holds without using it.
FRAGMENTATION = 0.05
# Sizes of PyTorch's CUDA allocator, and of its CPU allocator (alignment).
GRANULE = {"cuda": 512, "cpu": 64}
SHARDS = ("none", "fsdp")
STEPS = 2  # the second one has optimizer states from its start


@dataclass(frozen=True)
class Step:
    """What one training step computes.

    Attributes:
        module: Holds every parameter that is trained.
        loss: Scalar loss of images (B, 3, H, W) and labels (B,).
        teachers: Frozen modules that the loss runs.
        optimizer: Makes the optimiser of ``module``; None: fused AdamW.
    """

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    teachers: list[nn.Module] = field(default_factory=list)
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak of a training step; ``str`` of it is a table.

    Attributes:
        batch: Images per step.
        image_size: (height, width) of them.
        device: "cuda" or "cpu".
        checkpointing: Whether activations are recomputed.
        phase: What is going on at the peak: forward, backward or optimizer.
        tensors: Bytes of all tensors at the peak.
        overhead: Bytes that the device needs besides.
        categories: Bytes of tensors at the peak by purpose.
        modules: Bytes of tensors at the peak by module, then purpose.
        flops: Operations of the step's matrix products, recomputed ones included.
        processes: How many train together; the plan is that of each, on a device of its own.
        shard: "fsdp": parameters, gradients and states lie in shards on all of them.
    """

    batch: int
    image_size: tuple[int, int]
    device: str
    checkpointing: bool
    phase: str
    tensors: int
    overhead: int
    categories: dict[str, int]
    modules: dict[str, dict[str, int]]
    flops: int
    processes: int = 1
    shard: str = "none"

    @property
    def peak_bytes(self) -> int:
        """What the device must have."""
        return self.tensors + self.overhead

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of what a checkpoint holds: the trained model and the optimiser's states."""
        held = self.categories[PARAMETERS] + self.categories[OPTIMIZER]
        return held if self.shard == "none" else held * self.processes

    def __str__(self) -> str:
        recompute = ", checkpointing" if self.checkpointing else ""
        if self.processes > 1:
            how = "in shards" if self.shard == "fsdp" else "with whole copies"
            recompute += f", on each of {self.processes} processes {how}"
        size = " x ".join(map(str, self.image_size))
        lines = [
            f"batch {self.batch}, {size}, {self.device}{recompute}: peak in the {self.phase}",
            *(f"  {name:<28}{mib(size):>12}" for name, size in self.categories.items() if size),
            f"  {'tensors':<28}{mib(self.tensors):>12}",
        ]
        if self.overhead:
            lines.append(f"  {'context, workspace, unused':<28}{mib(self.overhead):>12}")
            lines.append(f"  {'needed':<28}{mib(self.peak_bytes):>12}")
        lines += ["", *self._module_lines()]
        return "\n".join(lines)

    def _module_lines(self) -> list[str]:
        """One line per group of consecutive modules that are alike."""
        used = [name for name in CATEGORIES if self.categories.get(name)]
        titles = [name.split()[0] for name in used]
        lines = ["  ".join([f"{'MiB by module':<28}", *(f"{title:>11}" for title in titles)])]
        groups: list[tuple[list[str], dict[str, int]]] = []
        for name, sizes in self.modules.items():
            cells = {key: size for key, size in sizes.items() if size}
            if groups and groups[-1][1] == cells and cells:
                groups[-1][0].append(name)
            elif cells:
                groups.append(([name], cells))
        for names, cells in groups:
            label = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} (each)"
            row = (f"{cells.get(key, 0) / MIB:>11,.1f}" for key in used)
            lines.append("  ".join([f"{label:<28}", *row]))
        return lines


def mib(size: int) -> str:
    """Bytes as MiB."""
    return f"{size / MIB:,.0f} MiB"


def plan_step(
    build: Callable[[], Step],
    batch: int,
    *,
    image_size: int | tuple[int, int],
    amp: torch.dtype | None = None,
    checkpointing: bool = False,
    device: str = "cuda",
    channels: int = 3,
    processes: int = 1,
    shard: str = "none",
) -> MemoryPlan:
    """Predicts the peak of a training step without allocating it.

    Two steps run on fake tensors; every storage that an op returns is counted while it lives.

    Args:
        build: Makes the step; called where tensors have no memory.
        batch: B.
        image_size: Side, or (height, width).
        amp: Dtype of autocast; None: fp32.
        checkpointing: Only said in the result; ``build`` turns it on.
        device: "cuda": autocast rules, op kernels and allocator sizes of CUDA, and its overhead;
            "cpu": tensors of this CPU as they are.
        channels: Number of channels of the images.
        processes: How many train together, each with ``batch`` images.
        shard: "fsdp" or "none", as the key of that name in configs.

    Raises:
        ValueError: ``batch``, ``device``, ``processes`` or ``shard`` is not possible, or nothing is
            known of the blocks of a model that is to be sharded.
    """
    if batch < 1:
        raise ValueError(f"plan: batch must be at least 1, got {batch}")
    if device not in GRANULE:
        raise ValueError(f"plan: device must be one of {sorted(GRANULE)}, got {device!r}")
    if processes < 1:
        raise ValueError(f"plan: processes must be at least 1, got {processes}")
    if shard not in SHARDS:
        raise ValueError(f"plan: shard must be one of {SHARDS}, got {shard!r}")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    # Not fake from the start: constructors read values (of linspace), which fake tensors lack.
    with torch.device("meta"):
        step = build()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for module in (step.module, *step.teachers):
            _materialise(module)
        if device == "cuda":
            stack.enter_context(as_on_cuda((step.module, *step.teachers)))
        ledger = run_steps(step, (batch, channels, *size), amp, device, processes, shard)
    tensors = ledger.peak
    overhead = 0
    if device == "cuda":
        overhead = CONTEXT + WORKSPACE + int(FRAGMENTATION * tensors)
    return MemoryPlan(
        batch=batch,
        image_size=size,
        device=device,
        checkpointing=checkpointing,
        phase=ledger.phase,
        tensors=tensors,
        overhead=overhead,
        categories=_by_category(ledger.at_peak),
        modules=_by_module(ledger.at_peak),
        flops=ledger.flops // STEPS,
        processes=processes,
        shard=shard,
    )


def _materialise(module: nn.Module) -> None:
    """Replaces meta tensors by fake ones on the CPU; shared ones stay shared."""
    made: dict[int, Any] = {}

    def fresh(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            like: Any = torch.empty_like(tensor, device="cpu")
            if isinstance(tensor, nn.Parameter):
                like = nn.Parameter(like, tensor.requires_grad)
            made[id(tensor)] = like
        return made[id(tensor)]

    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fresh(tensor)
    for part in module.modules():
        if isinstance(part, EVAViT):
            part.fill_rope()


def run_steps(
    step: Step,
    shape: tuple[int, ...],
    amp: torch.dtype | None,
    device: str,
    processes: int = 1,
    shard: str = "none",
) -> Ledger:
    """Two training steps under a ledger, on fake or real CPU tensors.

    With several processes these are the steps of one of them.
    """
    module = step.module.train()
    optimizer = _optimizer(step, device)
    shards = None
    if shard == "fsdp" and processes > 1:
        shards = Shards(module, step.teachers, processes)
        shards.optimize(optimizer)
    ledger = Ledger(module, step.teachers, GRANULE[device], () if shards is None else shards.absent)
    copies = Copies(module) if processes > 1 and shards is None else None
    if copies is not None:
        for gradient in copies.gradients.values():
            ledger.mark(gradient, GRADIENTS, "")
    around = nullcontext() if shards is None else shards.watching(ledger)
    with around, ledger.watching():
        for _ in range(STEPS):
            images, labels = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
            for tensor in (images, labels):
                ledger.mark(tensor, INPUTS, "")
            # As ``kdfast.trainer.sharding.prepare`` has it.
            cache = shards is None
            autocast = (
                nullcontext()
                if amp is None
                else torch.autocast("cpu", dtype=amp, cache_enabled=cache)
            )
            with ledger.during("forward"), autocast:
                loss = step.loss(images, labels)
            with ledger.during("backward"):
                if copies is not None:
                    copies.begin()
                loss.backward()
                if shards is not None:
                    shards.finish()
            with ledger.during("optimizer step"):
                optimizer.step()
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        ledger.mark(value, OPTIMIZER, "")
            optimizer.zero_grad(set_to_none=True)
            del images, labels, loss
    return ledger


def _optimizer(step: Step, device: str) -> torch.optim.Optimizer:
    if step.optimizer is None:
        trained = [p for p in step.module.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, fused=True)
    optimizer = step.optimizer(step.module)
    for group in optimizer.param_groups:
        # The default on CUDA, which costs copies of the parameters' size.
        if device == "cuda" and group.get("foreach", 0) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def _by_category(books: Books) -> dict[str, int]:
    sums = dict.fromkeys(CATEGORIES, 0)
    for (category, _), size in books.items():
        sums[category] += size
    return sums


def _by_module(books: Books) -> dict[str, dict[str, int]]:
    """Sums for each block, or for each other part of the model."""
    sums: dict[str, dict[str, int]] = {}
    for (category, module), size in books.items():
        parts = [part for part in module.split(".") if part not in ("student", "net")]
        keep = 1 + next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        name = ".".join(parts[:keep]) or "(no module)"
        group = sums.setdefault(name, {})
        group[category] = group.get(category, 0) + size
    return sums


def supervised(
    student: nn.Module,
    teacher: nn.Module | None,
    optimizer: str = "adamw",
    *,
    temperature: float = 4.0,
    alpha: float = 0.7,
) -> Step:
    """Cross-entropy, with a teacher the distillation loss, of classifiers (B, 3, H, W) -> (B, C).

    Args:
        student: Trained.
        teacher: Frozen here.
        optimizer: "adamw" is the fused one; otherwise a name of timm.
        temperature: Temperature of ``kd_loss``.
        alpha: Weight of distillation in ``kd_loss``.
    """
    if teacher is not None:
        teacher.requires_grad_(False).eval()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        if teacher is None:
            return F.cross_entropy(student(images).float(), labels)
        with torch.no_grad():
            goal = teacher(images)
        return kd_loss(student(images), goal, labels, temperature=temperature, alpha=alpha)[0]

    return Step(student, loss, [] if teacher is None else [teacher], optimizer_of(optimizer))


def optimizer_of(
    name: str, *, fused: bool = True
) -> Callable[[nn.Module], torch.optim.Optimizer] | None:
    """Factory of an optimiser of timm's; None for fused AdamW.

    Args:
        name: As in ``timm.optim.create_optimizer_v2``.
        fused: Whether "adamw" is the fused one, which makes no copies.
    """
    if name == "adamw" and fused:
        return None
    from timm.optim._optim_factory import create_optimizer_v2

    return lambda module: create_optimizer_v2(module, opt=name, lr=1e-3)


def checkpointed(module: nn.Module, on: bool) -> nn.Module:
    """The module, set to recompute its blocks or not.

    Raises:
        ValueError: It cannot.
    """
    for part in module.modules():
        setter: Any = getattr(part, "set_grad_checkpointing", None)
        if callable(setter):
            setter(on)
            return module
        if hasattr(part, "with_cp"):
            cast(Any, part).with_cp = on
            return module
    if on:
        raise ValueError(f"plan: {type(module).__name__} has no gradient checkpointing")
    return module
