# SPDX-License-Identifier: Apache-2.0
"""How far the attention maps of two calls are apart. B batch, H heads, N tokens, D head dim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.nn.heads import AttentionCall
from kdfast.ops.attention_distill import attention_distill, row_distance
from kdfast.ops.pruned_attention import rotated


def map_distance(
    mine: AttentionCall, theirs: AttentionCall, kind: str, heads: Sequence[int] | None = None
) -> Tensor:
    """Mean distance of a student's attention maps to a teacher's: those that the models use.

    A position bias is part of a map; with one on either side the maps are held whole, in eager
    torch.

    Args:
        mine: The student's call, heads (B, Hs, N, D).
        theirs: The teacher's call, (B, Ht, N, Dt); it gets no gradient.
        kind: As in ``kdfast.attention_distill``.
        heads: The teacher's head that each of the student's imitates; by ``head_groups`` if None.
    """
    if heads is None:
        heads = head_groups(mine.q.shape[1], theirs.q.shape[1])
    if mine.bias is not None or theirs.bias is not None:
        with torch.autocast(mine.q.device.type, enabled=False):
            goal = _selected(theirs, heads).scores().detach()
            own = mine.scores()
            return row_distance(own, goal.to(own.dtype), kind).mean()
    if theirs.rope is None:
        # The op would rotate the teacher by the student's tables.
        mine = turned(mine)
    # The output of this attention is not used: it gets no gradient.
    _, loss = attention_distill(
        mine.q,
        mine.k,
        mine.k.detach(),
        theirs.q,
        theirs.k,
        teacher_heads=heads,
        kind=kind,
        rope=mine.rope,
        scale=mine.scale,
        teacher_rope=theirs.rope,
        teacher_scale=theirs.scale,
    )
    return loss


def head_groups(students: int, teachers: int) -> list[int]:
    """The teacher head that each student head imitates: the first one of its group."""
    return [i * teachers // students for i in range(students)]


def relation_heads(x: Tensor, count: int, what: str) -> Tensor:
    """(B, H, N, D) as ``count`` heads (B, R, N, H D / R) over the concatenation of all heads.

    Raises:
        ValueError: R does not divide H D.
    """
    b, h, n, d = x.shape
    if h * d % count:
        raise ValueError(
            f"distill.relation_heads: must divide the width {h * d} of {what}, got {count}"
        )
    return x.transpose(1, 2).reshape(b, n, count, h * d // count).transpose(1, 2)


def turned(call: AttentionCall) -> AttentionCall:
    """The same call with queries and keys that are rotated already."""
    q, k = (rotated(x, call.rope, None) for x in (call.q, call.k))
    return call._replace(q=q, k=k, rope=None)


def as_relation(call: AttentionCall, count: int, what: str) -> AttentionCall:
    """The call with the channels of all heads split anew into ``count`` heads.

    The scale changes with the head dim as the default scale D ** -0.5 does.
    """
    call = turned(call)
    q, k = (relation_heads(x, count, what) for x in (call.q, call.k))
    old = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
    return AttentionCall(q, k, None, None, old * (call.q.shape[3] / q.shape[3]) ** 0.5)


def _selected(call: AttentionCall, heads: Sequence[int]) -> AttentionCall:
    if list(heads) == list(range(call.q.shape[1])):
        return call
    q, k = (torch.stack([x[:, head] for head in heads], 1) for x in (call.q, call.k))
    rows = None if call.bias is None else torch.stack([call.bias[:, head] for head in heads], 1)
    return call._replace(q=q, k=k, bias=rows)
