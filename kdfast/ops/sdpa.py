# SPDX-License-Identifier: Apache-2.0
"""torch's scaled_dot_product_attention, by the fused kernel where the call is one that it has.

See docs/use/accelerate.md. B batch, H heads, N tokens, M key tokens, D head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops._attention_args import DTYPES
from kdfast.ops._checks import check_tensors
from kdfast.ops._library import BACKENDS, DEFAULT_BACKEND
from kdfast.ops._watch import has_values, traced, transformed
from kdfast.ops.geometry import Rope
from kdfast.ops.pruned_attention import pruned_attention, reference, rotated, why_not

# What a model without kdfast runs; no choice of users, who leave kdfast out for that.
TORCH = "torch"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, fused where that is the same thing.

    Fused: query, key and value of one shape (B, H, N, D), no dropout, not causal, on a device whose
    compiled kernel is there; on the CPU also with a mask, which becomes the bias of
    ``kdfast.pruned_attention``. A query whose keys are all masked gets zeros, as from torch. Not
    fused: another number of keys than of queries, grouped heads, other than four dimensions,
    dropout, causal calls (their mask can be passed instead), tensor subclasses (nested tensors, the
    masks of ``torch.nn.attention.bias``) and, on CUDA, masks. Those calls are torch's own function,
    so the call never fails where torch's works, and fails with torch's error where it does not;
    ``backend="fused"`` asks for the kernel or an error. "auto" keeps torch's function too while
    ``torch.export`` traces, so that the exported graph needs no kdfast, and, outside of
    ``torch.compile``, where ``torch.nn.attention.sdpa_kernel`` leaves out FLASH_ATTENTION, of which
    the kernel is one.

    Args:
        query: (B, H, N, D), fp16, bf16, fp32 or fp64.
        key: (B, H, M, D).
        value: (B, H, M, D).
        attn_mask: Boolean or additive mask that broadcasts to (B, H, N, M). A boolean one is turned
            into an additive one of fp32, of its own size.
        dropout_p: Probability to drop an attention weight; applied whenever it is above 0.
        is_causal: Whether a token sees only itself and the tokens before it.
        scale: Multiplies the scores; D ** -0.5 if None.
        enable_gqa: Whether key and value may have fewer heads than query.
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None. The reference is
            eager and holds the whole score matrix.

    Returns:
        (B, H, N, D) in query's dtype.

    Raises:
        TypeError: query, key, value or attn_mask is no tensor.
        ValueError: ``backend`` is not one of the three.
        RuntimeError: torch's function refuses the call.
        NotImplementedError: ``backend="fused"`` and the kernel lacks something (it says what).

    Gradients: query, key, value and an additive attn_mask.
    """
    op = "scaled_dot_product_attention"
    check_tensors(op, ("query", "key", "value"), query, key, value)
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(f"{op}: attn_mask must be a tensor, got {type(attn_mask).__name__}")
    reason = unfused(query, key, value, None, dropout_p, is_causal, scale)
    if reason is None and attn_mask is not None and not _fits(attn_mask, query):
        reason = "the kernels take no mask of this kind"
    if reason and _choice(backend) == "fused":
        raise NotImplementedError(f"{op}: backend='fused' cannot run here: {reason}")
    if reason or _torch_is_better(query, backend):
        if query.dim() == 4 and query.shape[1] == 0:
            # Before torch 2.12 its function ends the process on a CPU where there are no heads.
            return query @ key.transpose(-2, -1) @ value
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bias = None if attn_mask is None else _as_bias(attn_mask, query)
    return pruned_attention(query, key, value, scale=scale, bias=bias, backend=backend)


def _fits(mask: Tensor, query: Tensor) -> bool:
    """Whether a mask can be a bias of the scores of query (B, H, N, D)."""
    if not has_values(mask) or not 2 <= mask.dim() <= 4 or 0 in mask.shape:
        return False
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device != query.device:
        return False
    want = (*query.shape[:2], query.shape[2], query.shape[2])[4 - mask.dim() :]
    return all(have in (1, need) for have, need in zip(mask.shape, want, strict=True))


def _as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """A mask that fits as (G, H, N, N) to be added, G 1 or B; what broadcasts is not copied."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.expand(-1, query.shape[1], query.shape[2], query.shape[2])


def _torch_is_better(q: Tensor, backend: str | None) -> bool:
    """Whether torch's function is taken for a call that a kernel has."""
    if backend == TORCH:
        return True
    if _choice(backend) != "auto":
        return False
    if transformed():
        # torch's kernels have no rule for vmap and none for forward mode; the reference needs none.
        return False
    if traced() or not has_values(q) or why_not(q) is not None:
        return True
    # torch.compile cannot trace the question.
    return not torch.compiler.is_compiling() and not torch.backends.cuda.flash_sdp_enabled()


def unfused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
) -> str | None:
    """What the call has that no kernel of this package does, or None."""
    if attn_mask is not None:
        return "the kernels take no mask of this kind"
    if is_causal:
        return "the kernels are not causal"
    if dropout_p != 0:
        return f"the kernels have no dropout of attention weights, got dropout_p={dropout_p}"
    if scale is not None and not (isinstance(scale, int | float) and -math.inf < scale < math.inf):
        return f"the kernels take a finite number as scale, got {scale}"
    inputs = (query, key, value)
    if not all(has_values(x) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs)
        return f"the kernels take plain strided tensors, got {kinds}"
    if query.dim() != 4 or query.shape[3] == 0:
        return f"the kernels take 4 dimensions, D >= 1, got {query.dim()}: {tuple(query.shape)}"
    if not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        return f"the kernels take query, key and value of one shape, got {shapes}"
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        dtypes = ", ".join(str(x.dtype) for x in inputs)
        return f"the kernels take query, key and value of one floating dtype, got {dtypes}"
    if not query.device == key.device == value.device:
        devices = ", ".join(str(x.device) for x in inputs)
        return f"the kernels take query, key and value on one device, got {devices}"
    return None


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rope: Rope | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``pruned_attention`` of all heads, or torch's function where that is the better fallback.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D).
        v: (B, H, N, D).
        rope: Tables for q and k.
        scale: Multiplies the scores; D ** -0.5 if None.
        bias: (G, H, N, N) added to the scaled scores, as in ``pruned_attention``.
        backend: As in ``pruned_attention``, except that "auto" takes torch's function, not the
            reference with its whole score matrix, where the kernel is missing, and while
            ``torch.export`` traces. "torch" always takes it.

    Returns:
        (B, H, N, D) in q's dtype.
    """
    if _torch_is_better(q, backend):
        if bias is not None and traced():
            # ONNX has no function that leaves its result in the memory order of torch's.
            scale = q.shape[3] ** -0.5 if scale is None else scale
            return reference(q, k, v, None, rope, scale, None, bias)
        q, k = rotated(q, rope, None), rotated(k, rope, None)
        mask = None if bias is None else repeated(bias, q)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return pruned_attention(q, k, v, rope=rope, scale=scale, bias=bias, backend=backend)


def repeated(bias: Tensor, q: Tensor) -> Tensor:
    """A bias (G, H, N, N) for every image of q (B, H, N, D), as torch's function takes it."""
    times = q.shape[0] // bias.shape[0]
    if bias.shape[0] > 1 and (times > 1 or traced()):
        bias = bias.repeat(times, 1, 1, 1)
    return bias.to(q.dtype)


def _choice(backend: str | None) -> str:
    backend = DEFAULT_BACKEND if backend is None else backend
    if backend not in BACKENDS:
        raise ValueError(
            f"scaled_dot_product_attention: backend must be one of {BACKENDS} or None, "
            f"got {backend!r}"
        )
    return backend
