# SPDX-License-Identifier: Apache-2.0
"""What the losses that compute their gradient in the forward pass share."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops._torch_private import graph_is_kept, is_legacy_batched, is_wrapped

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Options(NamedTuple):
    """What ``kd_loss`` and ``linear_kd_loss`` are told besides tensors, in their schemas' order."""

    temperature: float
    alpha: float
    reduction: str
    label_smoothing: float
    ignore_index: int


def check_pair(op: str, names: tuple[str, str], student: Tensor, teacher: Tensor) -> None:
    """Raises TypeError or ValueError unless both are floating, of one shape, on one device."""
    for name, x in zip(names, (student, teacher), strict=True):
        if x.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be one of {FLOATING}, got {x.dtype}")
    mine, other = names
    if student.shape != teacher.shape:
        raise ValueError(
            f"{op}: {other} must have the shape of {mine}, "
            f"got {tuple(teacher.shape)} and {tuple(student.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{op}: {other} must be on the device of {mine}, "
            f"got {teacher.device} and {student.device}"
        )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of an input of ``dtype`` waits for the backward pass."""
    # The loss scale that keeps fp16 gradients from vanishing arrives only in the backward pass.
    return torch.float32 if dtype == torch.float16 else dtype


def scaled_gradient(op: str, saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient saved in the forward pass times the upstream gradient, in ``dtype``.

    Raises:
        NotImplementedError: Under ``create_graph=True``: the saved tensor has no derivative.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: the fused kernel has no second derivative; use backend='reference'"
        )
    # Neither can be looked at while it is traced or batched.
    plain = _is_plain(saved) and _is_plain(upstream) and not torch.compiler.is_compiling()
    # A graph that is not kept will not be asked again, so its buffer can be given away: the pages
    # of a fresh one would cost more than the arithmetic.
    if not plain or graph_is_kept():
        return (saved * upstream).to(dtype)
    # The usual upstream of loss.backward(); spares a pass. Looking would stall a GPU.
    if upstream.device.type == "cpu" and upstream.dim() == 0 and upstream.item() == 1:
        return saved.to(dtype)
    return saved.mul_(upstream).to(dtype)


def _is_plain(x: Tensor) -> bool:
    """False for subclasses and under vmap, which ``is_grads_batched`` uses in its older form."""
    return type(x) is Tensor and not (is_wrapped(x) or is_legacy_batched(x))
