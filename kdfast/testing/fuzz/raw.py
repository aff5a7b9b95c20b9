# SPDX-License-Identifier: Apache-2.0
"""Calls of the registered ops as valid calls make them, and what is left of those after changes."""

import random
from typing import Any

import torch
from torch import Tensor

from kdfast.ops._torch_private import TorchDispatchMode, schema_arguments

Args = list[Any]
BIG = (2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 922337203685477581)
# What a call of anything may raise.
REFUSALS = (TypeError, ValueError, IndexError, RuntimeError)


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of kdfast that runs inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Args]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "kdfast":
            kept = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
            self.calls.append((func, kept))
        return func(*args, **(kwargs or {}))


def changed(func: Any, args: Args, draw: random.Random) -> tuple[Args, str]:
    """``args`` with one to three of them changed, and what was changed."""
    args, notes = list(args), []
    for place in draw.sample(range(len(args)), min(len(args), draw.randint(1, 3))):
        name = schema_arguments(func)[place].name
        args[place] = _other(args[place], draw)
        notes.append(f"{name}={_brief(args[place])}")
    return args, f"{func.name()} {', '.join(notes)}"


def _other(x: Any, draw: random.Random) -> Any:
    if isinstance(x, Tensor):
        return _other_tensor(x, draw)
    if isinstance(x, bool):
        return not x
    if isinstance(x, int):
        return draw.choice((0, 1, -1, 2, x + 1, x - 1, *BIG))
    if isinstance(x, float):
        return draw.choice((0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")))
    if isinstance(x, str):
        return draw.choice(("", "none", "kl", "mean", "sum", "cosine", "layer", "nonsense"))
    if isinstance(x, list):
        return _other_list(x, draw)
    # None: an optional tensor, list or number.
    return draw.choice((torch.randn(3), torch.randn(2, 8), [0, 0], [1], [2, 2], 5, BIG[0]))


def _other_list(x: list[Any], draw: random.Random) -> Any:
    if x and isinstance(x[0], Tensor):
        return draw.choice((x[:-1], [*x, x[0]], [_other_tensor(x[0], draw), *x[1:]]))
    big = draw.choice(BIG)
    forms = [[], [*x, 0], x + x, x[:-1], [big], [-1], [big, big], [20, big], [2**32, 2**32]]
    if x and not isinstance(x[0], bool):
        forms += [[x[0]] * len(x), [value + 1 for value in x], [x[0] * 2, *x[1:]]]
    return draw.choice(forms)


def _other_tensor(x: Tensor, draw: random.Random) -> Any:
    forms: list[Any] = [
        lambda: x.to(draw.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16))),
        lambda: x.to(draw.choice((torch.int64, torch.uint8, torch.bool, torch.complex64))),
        lambda: x.to("meta"),
        lambda: x.flatten(),
        lambda: x[None],
        lambda: x.new_empty(()).fill_(0),
        lambda: x.new_zeros(0),
        lambda: x.mT if x.dim() > 1 else x,
        lambda: x.mT.contiguous().mT if x.dim() > 1 else x,
        lambda: None,
    ]
    if x.dim() and x.numel():
        at = draw.randrange(x.dim())
        forms += [
            lambda: x.narrow(at, 0, x.shape[at] - 1),
            lambda: x.narrow(at, 0, 0),
            lambda: torch.cat([x, x.narrow(at, 0, 1)], at),
            lambda: x.narrow(at, 0, 1).expand_as(x),
            lambda: x.narrow(at, 0, 1),
            lambda: torch.stack([x, x], -1)[..., 0],
        ]
    return draw.choice(forms)()


def _brief(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype)[6:]}{tuple(x.shape)}/{x.stride()}@{x.device.type}"
    if isinstance(x, list) and x and isinstance(x[0], Tensor):
        return str([_brief(value) for value in x])
    return repr(x)


def tensors(x: Any) -> list[Tensor]:
    """All tensors in arguments or results."""
    if isinstance(x, Tensor):
        return [x]
    return [t for part in x for t in tensors(part)] if isinstance(x, list | tuple) else []


def tame(args: Args) -> bool:
    """Whether nothing in the arguments makes a NaN by itself."""
    numbers = [abs(x) for x in args if isinstance(x, float)]
    return all(1e-6 < x < 1e6 or x == 0 for x in numbers) and all(
        t.is_meta or t.is_complex() or not t.is_floating_point() or not t.isnan().any()
        for t in tensors(args)
    )
