# SPDX-License-Identifier: Apache-2.0
"""Arguments of the attention ops: their checks, and their form in a schema.

B batch, H heads, N tokens, D head dim, G biases that the images of a batch take in turn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops.geometry import Rope, Window

Scores = tuple[Tensor | None, Tensor | None, int, bool, float]
Windows = tuple[list[int] | None, int, Tensor | None]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_qkv(op: str, **tensors: Tensor) -> None:
    """Raises TypeError or ValueError unless all are (B, H, N, D) of one shape, dtype and device."""
    (first_name, first), *rest = tensors.items()
    if first.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{op}: {first_name} must be one of {names}, got {first.dtype}")
    if first.dim() != 4 or first.shape[3] == 0:
        raise ValueError(f"{op}: {first_name} must be (B, H, N, D), got {tuple(first.shape)}")
    for name, x in rest:
        if x.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must be {first.dtype} like {first_name}, got {x.dtype}")
        if x.shape != first.shape:
            raise ValueError(
                f"{op}: {name} must be {tuple(first.shape)} like {first_name}, got {tuple(x.shape)}"
            )
        if x.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first.device} like {first_name}, got {x.device}"
            )


def check_geometry(op: str, q: Tensor, rope: Rope | None, window: Window | None) -> None:
    """Raises unless the tables and windows fit q (B, H, N, D); see the callers' Raises."""
    heads, tokens, head_dim = q.shape[1:]
    tables: list[tuple[str, Tensor | None]] = []
    if window is not None:
        window.check(op, tokens, heads, head_dim)
        tables.append(("window.pad_value", window.pad_value))
    if rope is not None:
        rope.check(op, tokens if window is None else window.size**2, head_dim)
        if window is not None and rope.prefix:
            raise ValueError(f"{op}: rope.prefix must be 0 with a window, got {rope.prefix}")
        if torch.is_grad_enabled() and (rope.cos.requires_grad or rope.sin.requires_grad):
            raise NotImplementedError(f"{op}: rope tables get no gradient; detach them")
        tables += [("rope.cos", rope.cos), ("rope.sin", rope.sin)]
    for name, table in tables:
        if table is not None and table.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device} like q, got {table.device}")


def check_bias(op: str, q: Tensor, bias: Tensor, window: Window | None) -> None:
    """Raises unless bias (G, H, N, N) fits q (B, H, N, D) in a call without windows."""
    batch, heads, tokens, _ = q.shape
    if window is not None:
        raise NotImplementedError(
            f"{op}: bias must be None in a call with a window; fold the windows into the batch"
        )
    if bias.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{op}: bias must be {q.dtype} like q or torch.float32, got {bias.dtype}")
    if bias.dim() != 4 or bias.shape[1:] != (heads, tokens, tokens):
        raise ValueError(
            f"{op}: bias must be (H, N, N) or (G, H, N, N) with H = {heads} and N = {tokens}, "
            f"got {tuple(bias.shape)}"
        )
    if bias.shape[0] == 0 or batch % bias.shape[0]:
        raise ValueError(f"{op}: bias must have a G that divides B = {batch}, got {bias.shape[0]}")
    if bias.device != q.device:
        raise ValueError(f"{op}: bias must be on {q.device} like q, got {bias.device}")


def geometry_of(
    cos: Tensor | None,
    sin: Tensor | None,
    prefix: int,
    interleaved: bool,
    grid: Sequence[int] | None,
    size: int,
    pad_value: Tensor | None,
) -> tuple[Rope | None, Window | None]:
    """What ``geometry_args`` were made of."""
    rope = window = None
    if cos is not None and sin is not None:
        rope = Rope(cos, sin, prefix, "interleaved" if interleaved else "half")
    if grid is not None:
        window = Window((grid[0], grid[1]), size, pad_value)
    return rope, window


def geometry_tensors(rope: Rope | None, window: Window | None) -> list[Tensor | None]:
    """The tensors of both."""
    tables: list[Tensor | None] = [] if rope is None else [rope.cos, rope.sin]
    return tables if window is None else [*tables, window.pad_value]


def score_args(rope: Rope | None, scale: float) -> Scores:
    """A schema's arguments (cos, sin, prefix, interleaved, scale)."""
    if rope is None:
        return None, None, 0, True, scale
    return rope.cos, rope.sin, rope.prefix, rope.layout == "interleaved", scale


def window_args(window: Window | None) -> Windows:
    """A schema's arguments (grid, window, pad_value)."""
    if window is None:
        return None, 0, None
    return list(window.grid), window.size, window.pad_value


def geometry_args(
    rope: Rope | None, window: Window | None, scale: float
) -> tuple[Tensor | None, Tensor | None, int, bool, float, list[int] | None, int, Tensor | None]:
    """Those of ``score_args`` and then those of ``window_args``."""
    return *score_args(rope, scale), *window_args(window)
