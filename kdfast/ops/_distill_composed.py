# SPDX-License-Identifier: Apache-2.0
"""The KL divergence of attention maps from calls of torch's attention, in O(N) memory.

B batch, K heads, N tokens, D head dim; Dt the teacher's. See docs/ops/attention_distill.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of all maps above which they are not worth holding: 1 GiB in fp32.
MOST_ELEMENTS = 1 << 28
# Rows of scores that exist at a time while their log-sum-exp is taken.
ROWS = 256


def row_kl(
    q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, scale: float, teacher_scale: float
) -> Tensor:
    """(B, K, N) divergence of each row of ``softmax(scale q k^T)`` from the teacher's.

    With a and b the scores, A and B their log-sum-exp and R the teacher's map, a row is
    ``sum_j R_j b_j - sum_j R_j a_j + A - B``. A sum over the map is an attention call whose values
    are keys: ``sum_j R_ij <q_i, k_j> = <q_i, attention(teacher_q, teacher_k, k)_i>``.

    Args:
        q: (B, K, N, D), floating, rotated.
        k: (B, K, N, D).
        teacher_q: (B, K, N, Dt), rotated.
        teacher_k: (B, K, N, Dt).
        scale: Over the temperature, as is the teacher's.
        teacher_scale: Multiplies the teacher's scores.
    """
    with torch.no_grad():
        own = attention(teacher_q, teacher_k, teacher_k, teacher_scale)
        teacher = teacher_scale * (teacher_q * own).sum(-1)
        teacher -= log_sums(teacher_q, teacher_k, teacher_scale)
    cross = scale * (q * attention(teacher_q, teacher_k, k, teacher_scale)).sum(-1)
    # This sum over the student's map has the gradient of A, though not its value.
    mean = scale * (q * attention(q.detach(), k.detach(), k, scale)).sum(-1)
    with torch.no_grad():
        shift = log_sums(q, k, scale) - mean
    return teacher - cross + mean + shift


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's attention; values as wide as keys, as its CPU kernel without maps wants them."""
    dim, wide = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = (F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :dim]


def log_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, K, N) log-sum-exp of the rows of ``scale q k^T``."""
    parts = [(scale * x @ k.transpose(-1, -2)).logsumexp(-1) for x in q.split(ROWS, 2)]
    return torch.cat(parts, -1)
