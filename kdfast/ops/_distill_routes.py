# SPDX-License-Identifier: Apache-2.0
"""Ways to compute attention_distill that do not hold whole attention maps.

Each takes the checked arguments and returns out and loss as the op does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops import _distill_composed, _logit_gram
from kdfast.ops import pruned_attention as attention
from kdfast.ops._attention_args import geometry_args, score_args
from kdfast.ops._distill_args import Distillation
from kdfast.ops._matmul import products_of


def gram_pays(call: Distillation) -> bool:
    """Whether ``by_gram`` gives the loss and is the fastest way to it."""
    if call.kind != "logit_mse" or call.scale == 0:
        return False
    tokens, head_dim = call.q.shape[2:]
    return _logit_gram.pays(tokens, head_dim, call.teacher_q.shape[3], call.window)


def by_gram(call: Distillation, fused: bool) -> tuple[Tensor, Tensor]:
    """The kind "logit_mse" by Gram matrices; the attention by its kernel if ``fused``."""
    out = attention.pruned_attention(
        *(call.q, call.k, call.v),
        heads=call.heads,
        rope=call.rope,
        scale=call.scale,
        window=call.window,
        backend="fused" if fused else "reference",
    )
    loss = _logit_gram.logit_mse(*call.student(), *call.teacher(), *call.map_scales(), call.window)
    return out, loss


def by_kernel(call: Distillation) -> tuple[Tensor, Tensor]:
    """Any kind by the compiled kernel."""
    q, k, rope = call.q, call.k, call.rope
    teacher_q, teacher_k, teacher_rope = call.teacher_q, call.teacher_k, call.teacher_rope
    if rope is not None:
        q, k, rope = rope.whole(q, k)
    if teacher_rope is not None:
        teacher_q, teacher_k, teacher_rope = teacher_rope.whole(teacher_q, teacher_k)
    out, loss, _ = torch.ops.kdfast.attention_distill.default(
        *(q, k, call.v, teacher_q, teacher_k),
        *(call.heads, call.teacher_heads),
        *geometry_args(rope, call.window, call.scale),
        *score_args(teacher_rope, call.teacher_scale),
        *(call.temperature, call.kind, products_of(q)),
    )
    return out, loss


def composed_pays(call: Distillation) -> bool:
    """Whether ``composed`` gives the loss, and whole maps would take more than 1 GiB."""
    possible = call.kind == "kl" and call.window is None
    return possible and call.map_elements() > _distill_composed.MOST_ELEMENTS


def composed(call: Distillation) -> tuple[Tensor, Tensor]:
    """The kind "kl" without windows by calls of torch's attention, in O(N) memory."""
    (q, k), (teacher_q, teacher_k) = call.student(), call.teacher()
    v = call.v if call.heads is None else call.v[:, call.heads]
    out = F.scaled_dot_product_attention(q, k, v, scale=call.scale).to(q.dtype)
    dtype = attention.math_dtype(q.dtype)
    q, k, teacher_q, teacher_k = (x.to(dtype) for x in (q, k, teacher_q, teacher_k))
    rows = _distill_composed.row_kl(q, k, teacher_q, teacher_k, *call.map_scales())
    return out, rows.sum() / max(rows.numel(), 1)
