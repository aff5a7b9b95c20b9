# SPDX-License-Identifier: Apache-2.0
"""How far the attention maps of two calls are apart. B batch, H heads, N tokens, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.chain.pairing import head_groups, relation_heads
from kdfast.nn.heads import AttentionCall
from kdfast.ops.attention_distill import attention_distill, row_distance
from kdfast.ops.pruned_attention import rotated


def map_distance(mine: AttentionCall, theirs: AttentionCall, kind: str) -> Tensor:
    """Mean distance of a student's attention maps to a teacher's: those that the models use.

    Student head i of Hs imitates teacher head floor(i Ht / Hs). A position bias is part of a map;
    with one on either side the maps are held whole, in eager torch.

    Args:
        mine: The student's call, heads (B, Hs, N, D).
        theirs: The teacher's call, (B, Ht, N, Dt); it gets no gradient.
        kind: As in ``kdfast.attention_distill``.
    """
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


def _selected(call: AttentionCall, heads: list[int]) -> AttentionCall:
    if heads == list(range(call.q.shape[1])):
        return call
    q, k = (torch.stack([x[:, head] for head in heads], 1) for x in (call.q, call.k))
    rows = None if call.bias is None else torch.stack([call.bias[:, head] for head in heads], 1)
    return call._replace(q=q, k=k, bias=rows)
