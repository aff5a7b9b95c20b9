# SPDX-License-Identifier: Apache-2.0
"""The arguments of attention_distill: their checks, and one name for all of them together.

B batch, H heads, K kept heads, N tokens, D head dim; Ht, Dt the teacher's heads and head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import pruned_attention as attention
from kdfast.ops._attention_args import check_geometry, check_qkv
from kdfast.ops._checks import head_list
from kdfast.ops.geometry import Rope, Window


class Distillation(NamedTuple):
    """The checked arguments of a call."""

    q: Tensor  # (B, H, N, D)
    k: Tensor
    v: Tensor
    teacher_q: Tensor  # (B, Ht, N, Dt), without a gradient
    teacher_k: Tensor
    heads: list[int] | None  # K of H; all if None
    teacher_heads: list[int]  # K of Ht
    rope: Rope | None
    window: Window | None
    scale: float
    teacher_rope: Rope | None
    teacher_scale: float
    temperature: float
    kind: str

    def map_scales(self) -> tuple[float, float]:
        """What multiplies the scores of the student's and of the teacher's map.

        No property: torch.compile of torch 2.10 does not ask those of a named tuple.
        """
        return self.scale / self.temperature, self.teacher_scale / self.temperature

    def map_elements(self) -> int:
        """Elements of all maps of one side."""
        batch, _, tokens, _ = self.q.shape
        return batch * len(self.teacher_heads) * tokens**2

    def student(self) -> tuple[Tensor, Tensor]:
        """q and k of the kept heads, (B, K, N, D), rotated."""
        return turned_heads(self.q, self.k, self.heads, self.rope, self.window)

    def teacher(self) -> tuple[Tensor, Tensor]:
        """The teacher's q and k of its K heads, (B, K, N, Dt), rotated."""
        every = self.teacher_heads == list(range(self.teacher_q.shape[1]))  # then no copy is made
        heads = None if every else self.teacher_heads
        return turned_heads(self.teacher_q, self.teacher_k, heads, self.teacher_rope, self.window)


def turned_heads(
    q: Tensor, k: Tensor, heads: Sequence[int] | None, rope: Rope | None, window: Window | None
) -> tuple[Tensor, Tensor]:
    """q and k of the named heads, rotated."""
    if heads is not None:
        # An index would have to be copied to the device, which no CUDA graph can capture.
        sides = (q.unbind(1), k.unbind(1))
        q, k = (torch.stack([side[head] for head in heads], 1) for side in sides)
    return attention.rotated(q, rope, window), attention.rotated(k, rope, window)


def check_sides(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    rope: Rope | None,
    window: Window | None,
    teacher_rope: Rope | None,
) -> Rope | None:
    """The teacher's rope, after the checks of all tensors and of both geometries.

    Raises:
        TypeError: A dtype is not supported, or is another one than its partner's.
        ValueError: Shapes or devices do not match, or there is no rope for the teacher.
        NotImplementedError: A rope table requires a gradient.
    """
    op, teacher = "attention_distill", "attention_distill (teacher)"
    check_qkv(op, q=q, k=k, v=v)
    check_qkv(op, teacher_q=teacher_q, teacher_k=teacher_k)
    if (teacher_q.shape[0], teacher_q.shape[2]) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"{op}: teacher_q must be (B, Ht, N, Dt) with B, N = {q.shape[0]}, {q.shape[2]} like "
            f"q, got {tuple(teacher_q.shape)}"
        )
    if teacher_q.device != q.device:
        raise ValueError(f"{op}: teacher_q must be on {q.device} like q, got {teacher_q.device}")
    check_geometry(op, q, rope, window)
    if teacher_rope is None and rope is not None:
        if teacher_q.shape[3] != q.shape[3]:
            raise ValueError(
                f"{op}: teacher_rope must be given when Dt differs from D, got Dt = "
                f"{teacher_q.shape[3]}, D = {q.shape[3]}"
            )
        teacher_rope = rope
    bare = None if window is None else Window(window.grid, window.size)
    check_geometry(teacher, teacher_q, teacher_rope, bare)
    return teacher_rope


def teacher_head_list(
    heads: Sequence[int] | Tensor | None, count: int, teacher_count: int
) -> list[int]:
    """One teacher head for each of ``count`` kept student heads; they may repeat.

    Raises:
        TypeError: ``heads`` are not integers.
        ValueError: One is out of range, or they are not ``count``.
    """
    name = "teacher_heads"
    if heads is None:
        mapped = list(range(teacher_count))
    else:
        mapped = head_list("attention_distill", name, heads, teacher_count, distinct=False)
    if len(mapped) != count:
        raise ValueError(
            f"attention_distill: {name} must name one teacher head for each of the {count} kept "
            f"student heads, got {len(mapped)}"
        )
    return mapped
