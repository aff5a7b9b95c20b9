# SPDX-License-Identifier: Apache-2.0
"""Makes a step on CPU tensors allocate what the same step would on a GPU. See docs/use/memory.md.

Fake CUDA tensors can run a forward on a machine without CUDA, but not a backward: autograd asks
the driver for the device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdfast.memory.ledger import Following
from kdfast.ops import OPS
from kdfast.ops._torch_private import current_function_mode

HALF = (torch.float16, torch.bfloat16)
# What autocast runs in fp32 on CUDA, and leaves alone on CPUs; copies are saved for the backward.
WIDE = frozenset(
    (
        *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.mse_loss, F.l1_loss),
        *(F.smooth_l1_loss, F.huber_loss, F.kl_div, F.nll_loss, F.cross_entropy),
        *(F.cosine_similarity, F.binary_cross_entropy_with_logits, F.softplus, F.normalize),
        *(torch.softmax, torch.log_softmax, torch.logsumexp, torch.layer_norm, torch.group_norm),
        *(Tensor.softmax, Tensor.log_softmax, Tensor.logsumexp, Tensor.exp, Tensor.log),
        *(torch.exp, torch.log, torch.pow, torch.rsqrt, torch.reciprocal, torch.sum, torch.prod),
        *(Tensor.pow, Tensor.rsqrt, Tensor.reciprocal, Tensor.sum, Tensor.prod, Tensor.cumsum),
        *(Tensor.norm, torch.norm, torch.cumsum),
    )
)


class CudaAutocast(TorchFunctionMode):
    """Casts the arguments of ``WIDE`` to fp32 while autocast is on."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in WIDE and torch.is_autocast_enabled("cpu"):
            args = [_wide(x) for x in args]
            kwargs = {key: _wide(x) for key, x in kwargs.items()}
        return func(*args, **kwargs)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x


class _Recompute:
    """Turns the mode on in modules that run inside a backward, where torch turns modes off."""

    def __init__(self) -> None:
        self._open: list[tuple[nn.Module, CudaAutocast]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        if current_function_mode() is None:
            mode = CudaAutocast()
            mode.__enter__()
            self._open.append((module, mode))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open and self._open[-1][0] is module:
            self._open.pop()[1].__exit__(None, None, None)


@contextmanager
def as_on_cuda(roots: Sequence[nn.Module]) -> Iterator[None]:
    """CUDA's autocast, and every op as it runs on a GPU, whatever this machine has.

    Args:
        roots: Modules whose parts a backward may run again.
    """
    modules = [importlib.import_module(f"kdfast.ops.{op}") for op in OPS]
    before = [module.use_fused for module in modules]

    def fused(op: str, backend: str | None, reason: str | None, **rest: Any) -> bool:
        return backend != "reference" and OPS[op] is not None

    recompute, handles = _Recompute(), []
    try:
        for module in modules:
            module.use_fused = fused  # type: ignore[attr-defined]
        for part in (part for root in roots for part in root.modules()):
            handles.append(part.register_forward_pre_hook(Following(recompute.enter)))
            handles.append(part.register_forward_hook(Following(recompute.leave), always_call=True))
        with CudaAutocast():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, old in zip(modules, before, strict=True):
            module.use_fused = old  # type: ignore[attr-defined]
