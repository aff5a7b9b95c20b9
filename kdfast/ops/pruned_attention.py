# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over the kept heads, with RoPE and windows inside.

See docs/ops/pruned_attention.md.

B batch, H heads, K kept heads, N tokens, D head dim, G biases that the images of a batch take in
turn.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _flash
from kdfast.ops._attention_args import (
    check_bias,
    check_geometry,
    check_qkv,
    geometry_args,
    geometry_of,
    geometry_tensors,
)
from kdfast.ops._autocast import without_autocast
from kdfast.ops._checks import check_tensors, head_list
from kdfast.ops._library import (
    DEFAULT_BACKEND,
    LIB,
    call_below_autograd,
    forbid_second_derivative,
    fused_devices,
    not_compiled,
    register_fake,
    register_flops,
    register_gradient,
    register_launcher,
    second_derivative,
    use_fused,
)
from kdfast.ops._matmul import products_of
from kdfast.ops.geometry import Rope, Window, score_count

MAX_HEAD_DIM = 128  # of the CUDA kernel


def pruned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: Sequence[int] | Tensor | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    window: Window | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax self-attention over the kept heads; the other heads are never read.

    ``out[b, j] = softmax(scale * R(q)[b, h] R(k)[b, h]^T + bias[b % G, h]) v[b, h]`` with ``h =
    heads[j]`` and R the rotation of ``rope``, inside each window of ``window``. Under autocast q, k
    and v are first cast to its dtype (fp64 is left alone), and so is a bias that is not fp32.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 or fp64; any strides, fastest with a contiguous last dim.
        k: (B, H, N, D), dtype and device of q.
        v: (B, H, N, D), dtype and device of q.
        heads: K distinct head indices in [0, H); their order is the order of the result. All if
            None.
        rope: Tables for q and k; in a call with a window they are indexed inside the window.
        scale: Multiplies the scores; D ** -0.5 if None.
        window: Splits the tokens into windows; None: every token sees every token.
        bias: (G, H, N, N), or (H, N, N) for G = 1, in q's dtype or fp32: added to the scaled scores
            of the images b with ``b % G`` equal to its index; G divides B. Swin's windows, folded
            into the batch, take one each of its G biases. An entry may be -inf; a row of them gives
            a row of zeros and no gradient, as in torch. Not with ``window``.
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None. On a GPU "auto" is
            flash-attn for what its table says is faster so, see docs/internals/gpu.md.

    Returns:
        (B, K, N, D) in q's dtype, in the memory order (B, N, K, D), so that
        ``out.transpose(1, 2).flatten(2)`` is a view. Rotation, softmax and sums are done in fp32
        (fp64 for fp64); rotated queries and keys are rounded to q's dtype, as in ORION.

    Raises:
        TypeError: Dtypes differ or are not supported, ``heads`` are not integers, or a tensor is of
            another type.
        ValueError: Shapes or devices do not match, or a head is out of range or repeated.
        NotImplementedError: A rope table requires a gradient, a bias comes with a window, or
            ``backend="fused"`` and the kernel cannot run (the reason is given).

    Gradients: q, k, v, ``window.pad_value`` and ``bias`` (zero for heads that are not kept); none
    for the rope tables. Gradients that are to be differentiated again come from the reference. That
    of the bias is summed over the images in fp32, in slices of the batch that the shapes alone fix;
    they take up to 64 MiB, or one (G, K, N, N) where that is more. Deterministic: yes.
    Source: arXiv 1706.03762 eq. 1; arXiv 2205.14135 alg. 1; arXiv 2104.09864 sec. 3.4.
    """
    check_tensors("pruned_attention", ("q", "k", "v"), q, k, v)
    check_tensors("pruned_attention", ("bias",), bias, optional=True)
    device = q.device.type
    context, (q, k, v) = without_autocast(device, q, k, v)
    if bias is not None and bias.dtype not in (torch.float32, torch.float64):
        _, (bias,) = without_autocast(device, bias)
    check_qkv("pruned_attention", q=q, k=k, v=v)
    check_geometry("pruned_attention", q, rope, window)
    if bias is not None:
        bias = bias[None] if bias.dim() == 3 else bias
        check_bias("pruned_attention", q, bias, window)
    kept = None if heads is None else head_list("pruned_attention", "heads", heads, q.shape[1])
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    given = (q, k, v, bias, *geometry_tensors(rope, window))
    fused = use_fused(
        "pruned_attention", backend, why_not(q), compiled=device in FUSED_ON, given=given
    )
    with context:
        plain = kept is None and rope is None and window is None and bias is None
        if fused and plain and (backend or DEFAULT_BACKEND) == "auto" and _flash.takes(q):
            again = partial(reference, heads=None, rope=None, scale=scale, window=None)
            return _flash.attention(q, k, v, scale, again)
        if fused:
            if rope is not None:
                q, k, rope = rope.whole(q, k)
            op = torch.ops.kdfast.pruned_attention.default
            geometry = geometry_args(rope, window, scale)
            results = call_below_autograd(op, q, k, v, kept, *geometry, bias, products_of(q))
            out: Tensor = results[0]
            return out
        return reference(q, k, v, kept, rope, scale, window, bias)


def why_not(q: Tensor) -> str | None:
    """The reason why the compiled kernel cannot run this input, or None."""
    if q.device.type == "cuda":
        if q.dtype == torch.float64:
            return "the CUDA kernel takes fp16, bf16 and fp32, not fp64"
        if q.shape[3] > MAX_HEAD_DIM:
            return f"the CUDA kernel takes head dims up to {MAX_HEAD_DIM}, got {q.shape[3]}"
    return not_compiled("pruned_attention", q.device, FUSED_ON)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, rotations and the softmax of ``dtype`` inputs are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotated(x: Tensor, rope: Rope | None, window: Window | None) -> Tensor:
    """x (B, H, N, D) rotated in ``math_dtype`` and rounded back to its dtype."""
    if rope is None:
        return x
    tokens, dtype = x.shape[2], math_dtype(x.dtype)
    row = torch.arange(tokens, device=x.device)
    if window is not None:
        for span in window.spans():
            row[window.token_index(span, x.device)] = window.table_index(span, x.device)
    skipped = rope.prefix if rope.cos.shape[0] < tokens and window is None else 0
    row = row[rope.prefix :] - skipped
    cos, sin = rope.cos.to(dtype)[row], rope.sin.to(dtype)[row]
    width = cos.shape[1]
    y = x[:, :, rope.prefix :, :width].to(dtype)
    if rope.layout == "interleaved":
        turned = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    else:
        first, second = y.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    y = (y * cos + turned * sin).to(x.dtype)
    if width < x.shape[3]:
        y = torch.cat((y, x[:, :, rope.prefix :, width:]), 3)
    return torch.cat((x[:, :, : rope.prefix], y), 2) if rope.prefix else y


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Sequence[int] | None,
    rope: Rope | None,
    scale: float,
    window: Window | None,
    bias: Tensor | None = None,
) -> Tensor:
    """The specification: gathered heads, rotated, softmax over each window's whole score matrix."""
    pad = None if window is None else window.pad_value
    if heads is not None:
        index = torch.tensor(heads, device=q.device)
        q, k, v = (x.index_select(1, index) for x in (q, k, v))
        pad = None if pad is None else pad.index_select(0, index)
        bias = None if bias is None else bias.index_select(1, index)
    result, dtype = q.dtype, math_dtype(q.dtype)
    q, k, v = (x.to(dtype) for x in (rotated(q, rope, window), rotated(k, rope, window), v))
    if window is None:
        scores = scale * q @ k.transpose(-1, -2)
        weights = scores.softmax(-1) if bias is None else biased_weights(scores, bias.to(dtype))
        # In the memory order (B, N, K, D).
        return (weights @ v).to(result).transpose(1, 2).contiguous().transpose(1, 2)
    groups = [(window.token_index(s, q.device), window.pads(s)) for s in window.spans()]
    parts = []
    for tokens, pads in groups:
        scores = scale * q[:, :, tokens] @ k[:, :, tokens].transpose(-1, -2)
        if pad is None or pads == 0:
            part = scores.softmax(-1) @ v[:, :, tokens]
        else:
            # `pads` equal columns of logit 0 weigh as much as one column of logit log(pads).
            column = scores.new_full((*scores.shape[:-1], 1), math.log(pads))
            weights = torch.cat((scores, column), -1).softmax(-1)
            part = weights[..., :-1] @ v[:, :, tokens] + weights[..., -1:] * pad.to(dtype)[:, None]
        parts.append(part.transpose(1, 2))
    order = torch.cat([tokens for tokens, _ in groups]).argsort()
    return torch.cat(parts, 1).index_select(1, order).to(result).transpose(1, 2)


def biased_weights(scores: Tensor, bias: Tensor) -> Tensor:
    """softmax(scores (B, K, N, N) + bias (G, K, N, N)); rows without a finite score are zero."""
    # Not B // G: a trace keeps numbers that were computed.
    scores = (scores.unflatten(0, (-1, bias.shape[0])) + bias).flatten(0, 1)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)


_GEOMETRY = (
    "int[]? heads, Tensor? cos, Tensor? sin, int prefix, bool interleaved, float scale, "
    "int[]? grid, int window, Tensor? pad_value, Tensor? bias"
)
LIB.define(
    f"pruned_attention(Tensor q, Tensor k, Tensor v, {_GEOMETRY}, int products) "
    "-> (Tensor out, Tensor lse)"
)
LIB.define(
    "pruned_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_GEOMETRY}, bool bias_grad, int products) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dpad, Tensor dbias)"
)


def _empty_heads(x: Tensor, heads: int) -> Tensor:
    """(B, heads, N, D) in the memory order (B, N, heads, D)."""
    batch, _, tokens, head_dim = x.shape
    return x.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


@register_fake("pruned_attention")
def _fake(*, q: Tensor, heads: list[int] | None, **_: Any) -> tuple[Tensor, Tensor]:
    kept = q.shape[1] if heads is None else len(heads)
    lse = q.new_empty((q.shape[0], kept, q.shape[2]), dtype=math_dtype(q.dtype))
    return _empty_heads(q, kept), lse


@register_fake("pruned_attention_bwd")
def _fake_bwd(
    *, q: Tensor, pad_value: Tensor | None, bias: Tensor | None, bias_grad: bool, **_: Any
) -> tuple[Tensor, ...]:
    dq, dk, dv = (_empty_heads(q, q.shape[1]) for _ in range(3))
    dpad = q.new_empty(0) if pad_value is None else torch.empty_like(pad_value).contiguous()
    dbias = q.new_empty(0)
    if bias is not None and bias_grad:
        dbias = torch.empty_like(bias).contiguous()
    return dq, dk, dv, dpad, dbias


def products(q: Sequence[int], heads: list[int] | None, grid: list[int] | None, window: int) -> int:
    """Operations of one product of all queries with their keys."""
    kept = q[1] if heads is None else len(heads)
    return 2 * q[0] * kept * q[3] * score_count(q[2], grid, window)


@register_flops("pruned_attention")
def _flops(
    *, q: Sequence[int], heads: list[int] | None, grid: list[int] | None, window: int, **_: Any
) -> int:
    return 2 * products(q, heads, grid, window)


@register_flops("pruned_attention_bwd")
def _flops_bwd(
    *, q: Sequence[int], heads: list[int] | None, grid: list[int] | None, window: int, **_: Any
) -> int:
    return 5 * products(q, heads, grid, window)  # scores again, and four gradients


def _setup_context(ctx: Any, given: Any, output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    # The softmax is recomputed from lse; out is needed for the row sums of grad_out * out only.
    tables = given.cos, given.sin, given.pad_value
    ctx.save_for_backward(given.q, given.k, given.v, out, lse, *tables, given.bias)
    ctx.heads = given.heads
    # What stands between sin and pad_value in the schema.
    ctx.plain = given.prefix, given.interleaved, given.scale, given.grid, given.window
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:
    if grad_out is None:
        return {}
    q, k, v, out, lse, cos, sin, pad_value, bias = ctx.saved_tensors
    if torch.is_grad_enabled():

        def outputs(q: Tensor, k: Tensor, v: Tensor, pad: Any, bias: Any) -> list[Tensor]:
            prefix, interleaved, scale, grid, size = ctx.plain
            rope, window = geometry_of(cos, sin, prefix, interleaved, grid, size, pad)
            return [reference(q, k, v, ctx.heads, rope, scale, window, bias)]

        inputs = {"q": q, "k": k, "v": v, "pad": pad_value, "bias": bias}
        found = second_derivative(outputs, inputs, [grad_out])
        return {"pad_value" if name == "pad" else name: x for name, x in found.items()}
    geometry = (ctx.heads, cos, sin, *ctx.plain, pad_value, bias)
    op = torch.ops.kdfast.pruned_attention_bwd.default
    rest = ctx.needs.bias, products_of(q)
    dq, dk, dv, dpad, dbias = op(grad_out, q, k, v, out, lse, *geometry, *rest)
    grads = {"q": dq, "k": dk, "v": dv}
    if pad_value is not None:
        grads["pad_value"] = dpad
    if ctx.needs.bias:
        grads["bias"] = dbias
    return grads


register_gradient("pruned_attention", _backward, _setup_context)
forbid_second_derivative("pruned_attention_bwd", "pruned_attention")

# `products` is the choice of a CPU.
_cuda = register_launcher("pruned_attention", "pruned_attention.forward", 1)
_cuda_bwd = register_launcher("pruned_attention_bwd", "pruned_attention.backward", 1)
FUSED_ON = fused_devices("pruned_attention")
