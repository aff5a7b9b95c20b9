# SPDX-License-Identifier: Apache-2.0
"""Attention plus the distance of its maps to a teacher's. See docs/ops/attention_distill.md.

B batch, H heads, K kept heads, N tokens, D head dim; Ht, Dt the teacher's heads and head dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops import _distill_composed, _logit_gram
from kdfast.ops import pruned_attention as attention
from kdfast.ops._attention import bring_heads, check_geometry, check_qkv, geometry_args
from kdfast.ops._checks import check_tensors, head_list
from kdfast.ops._library import (
    DEFAULT_BACKEND,
    HAS_TRITON,
    LIB,
    fused_devices,
    not_compiled,
    register_gradient,
    use_fused,
)
from kdfast.ops.geometry import Rope, Window

# Numbers that the fused op keeps per row, by kind, in this order: the maximum of the scores and the
# log-sum-exp above it; the latter at the temperature; both of the teacher; the gradient's row sums.
STATS = {"kl": 5, "reverse_kl": 6, "jsd": 6, "mse": 6, "cosine": 7, "logit_mse": 2}


def attention_distill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    heads: Sequence[int] | Tensor | None = None,
    teacher_heads: Sequence[int] | Tensor | None = None,
    temperature: float = 1.0,
    kind: str = "kl",
    rope: Rope | None = None,
    window: Window | None = None,
    scale: float | None = None,
    teacher_rope: Rope | None = None,
    teacher_scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``pruned_attention`` of the student, and the distance of its attention maps to a teacher's.

    With P and R the student's and the teacher's row of ``softmax(scores / temperature)``: "kl" is
    KL(R || P), "reverse_kl" KL(P || R), "jsd" their Jensen-Shannon divergence, "mse"
    ``sum (P - R)^2``, "cosine" one minus their cosine, and "logit_mse" the mean squared difference
    of the scores / temperature. No kind has a factor temperature^2. Autocast as in
    ``pruned_attention``, the teacher's tensors included.

    Args:
        q: (B, H, N, D), fp16, bf16, fp32 or fp64.
        k: (B, H, N, D), dtype and device of q.
        v: (B, H, N, D), dtype and device of q.
        teacher_q: (B, Ht, N, Dt), floating, not yet rotated, device of q; Dt and the dtype may
            differ from q's.
        teacher_k: (B, Ht, N, Dt), dtype and device of teacher_q.
        heads: The K kept student heads; all if None.
        teacher_heads: The teacher head that each kept student head imitates, K indices in [0, Ht);
            a teacher head may serve several. If None, all Ht, which must then be K.
        temperature: Divides the scores of both maps, not those of the attention; above 0.
        kind: "kl", "reverse_kl", "jsd", "mse", "cosine" or "logit_mse".
        rope: Tables for q and k.
        window: As in ``pruned_attention``. Padded tokens with a ``pad_value`` are entries of both
            maps, of logit 0; "logit_mse" averages over the real keys only.
        scale: Multiplies the student's scores; D ** -0.5 if None.
        teacher_rope: Tables for the teacher; ``rope`` if None, which needs Dt == D. A teacher
            without rotation beside a student with one: tables of cos 1 and sin 0.
        teacher_scale: Multiplies the teacher's scores; Dt ** -0.5 if None.
        backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.

    Returns:
        out, (B, K, N, D), as ``pruned_attention`` returns it; and loss, scalar, fp32 (fp64 for
        fp64), the mean over images, kept heads and real queries; 0 for an empty batch.

    Raises:
        TypeError: Dtypes differ or are not supported, heads are not integers, or a tensor is of
            another type.
        ValueError: Shapes, devices, heads, ``temperature`` or ``kind`` do not fit.
        NotImplementedError: A rope table requires a gradient, or ``backend="fused"`` and the
            kernel cannot run (the reason is given).

    Gradients: q, k (of both results), v and ``window.pad_value`` (of out), zero for heads that are
    not kept; never the teacher. The fused op cannot be differentiated twice and keeps O(N) values
    for its backward. Deterministic: yes.
    Source: arXiv 2002.10957 (KL of attention maps); arXiv 1909.10351 (MSE of attention scores).
    """
    names = ("q", "k", "v", "teacher_q", "teacher_k")
    check_tensors("attention_distill", names, q, k, v, teacher_q, teacher_k)
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = (q, k, v, teacher_q, teacher_k)
        q, k, v, teacher_q, teacher_k = (
            x if x.dtype == torch.float64 else x.to(dtype) for x in tensors
        )
    teacher_rope = _checked(q, k, v, teacher_q, teacher_k, rope, window, teacher_rope)
    if kind not in STATS:
        raise ValueError(f"attention_distill: kind must be one of {tuple(STATS)}, got {kind!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"attention_distill: temperature must be above 0, got {temperature}")
    kept = None if heads is None else head_list("attention_distill", "heads", heads, q.shape[1])
    count = q.shape[1] if kept is None else len(kept)
    mapped = _teacher_heads(teacher_heads, count, teacher_q.shape[1])
    teacher_q, teacher_k = teacher_q.detach(), teacher_k.detach()
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    teacher_scale = teacher_q.shape[3] ** -0.5 if teacher_scale is None else float(teacher_scale)
    with torch.autocast(device, enabled=False):
        fused = use_fused(
            "attention_distill", backend, why_not(q, teacher_q), compiled=device in FUSED_ON
        )
        requested = backend or DEFAULT_BACKEND
        sizes = q.shape[2], q.shape[3], teacher_q.shape[3], window
        gram = kind == "logit_mse" and scale != 0 and _logit_gram.pays(*sizes)
        if gram and requested != "reference":
            student = _side(q, k, kept, rope, window)
            every = mapped == list(range(teacher_q.shape[1]))  # then no copy is made
            teacher = _side(teacher_q, teacher_k, None if every else mapped, teacher_rope, window)
            scales = scale / temperature, teacher_scale / temperature
            chosen = "fused" if fused else "reference"
            out = attention.pruned_attention(
                q, k, v, heads=kept, rope=rope, scale=scale, window=window, backend=chosen
            )
            return out, _logit_gram.logit_mse(*student, *teacher, *scales, window)
        if fused:
            op = torch.ops.kdfast.attention_distill.default
            student = geometry_args(rope, window, scale)
            teacher = geometry_args(teacher_rope, None, teacher_scale)[:5]
            out, loss, _ = op(
                q, k, v, teacher_q, teacher_k, kept, mapped, *student, *teacher, temperature, kind
            )
            return out, loss
        if requested != "reference" and kind == "kl" and window is None:
            if count * q.shape[0] * q.shape[2] ** 2 > _distill_composed.MOST_ELEMENTS:
                student = _side(q, k, kept, rope)
                teacher = _side(teacher_q, teacher_k, mapped, teacher_rope)
                values = v if kept is None else v[:, kept]
                return composed(*student, values, *teacher, scale, teacher_scale, temperature)
        out = attention.reference(q, k, v, kept, rope, scale, window)
        a = attention_scores(q, k, kept, rope, scale / temperature, window)
        b = attention_scores(
            teacher_q, teacher_k, mapped, teacher_rope, teacher_scale / temperature, window
        )
        return out, reference(a, b, kind)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    rope: Rope | None,
    window: Window | None,
    teacher_rope: Rope | None,
) -> Rope | None:
    """The teacher's rope, after the checks of all tensors and of both geometries."""
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


def _teacher_heads(
    heads: Sequence[int] | Tensor | None, count: int, teacher_count: int
) -> list[int]:
    """One teacher head per kept student head; unlike kept heads they may repeat."""
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


def why_not(q: Tensor, teacher_q: Tensor) -> str | None:
    """The reason why the compiled kernel cannot run this input, or None."""
    if q.device.type == "cuda":
        return attention.why_not(q) or attention.why_not(teacher_q)
    return not_compiled("attention_distill", q.device, FUSED_ON)


def attention_scores(
    q: Tensor,
    k: Tensor,
    heads: Sequence[int] | None,
    rope: Rope | None,
    scale: float,
    window: Window | None,
) -> list[tuple[Tensor, int]]:
    """Per window, ``scale * R(q) R(k)^T`` (B, K, n, n) of its n real tokens, and its live pads."""
    dtype = attention.math_dtype(q.dtype)
    q, k = (x.to(dtype) for x in _side(q, k, heads, rope, window))
    groups = [(torch.arange(q.shape[2], device=q.device), 0)]
    if window is not None:
        live = window.pad_value is not None
        groups = [
            (window.token_index(s, q.device), window.pads(s) if live else 0) for s in window.spans()
        ]
    return [(scale * q[:, :, i] @ k[:, :, i].transpose(-1, -2), pads) for i, pads in groups]


def _side(
    q: Tensor,
    k: Tensor,
    heads: Sequence[int] | None,
    rope: Rope | None,
    window: Window | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k of the named heads, rotated."""
    if heads is not None:
        # An index would have to be copied to the device, which no CUDA graph can capture.
        sides = (q.unbind(1), k.unbind(1))
        q, k = (torch.stack([side[head] for head in heads], 1) for side in sides)
    return attention.rotated(q, rope, window), attention.rotated(k, rope, window)


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    scale: float,
    teacher_scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The reference of "kl" in O(N) memory, by torch's attention: q and k as ``_side`` gives them.

    "auto" takes it in place of the reference where that would hold maps of more than 1 GiB.
    """
    dtype = attention.math_dtype(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale).to(q.dtype)
    q, k, teacher_q, teacher_k = (x.to(dtype) for x in (q, k, teacher_q, teacher_k))
    scale, teacher_scale = scale / temperature, teacher_scale / temperature
    rows = _distill_composed.row_kl(q, k, teacher_q, teacher_k, scale, teacher_scale)
    return out, rows.sum() / max(rows.numel(), 1)


def reference(
    student: Sequence[tuple[Tensor, int]], teacher: Sequence[tuple[Tensor, int]], kind: str
) -> Tensor:
    """The specification: mean row distance of the maps of ``attention_scores`` at temperature."""
    total, rows = student[0][0].new_zeros(()), 0
    for (a, pads), (b, _) in zip(student, teacher, strict=True):
        # A padded key is a live key of logit 0 on both sides.
        live = 0 if kind == "logit_mse" else pads
        distance = row_distance(F.pad(a, (0, live)), F.pad(b.to(a.dtype), (0, live)), kind)
        total, rows = total + distance.sum(), rows + distance.numel()
    return total / max(rows, 1)


def row_distance(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """(..., N) distance of the rows of softmax(b) (teacher) and softmax(a) (student), (..., N, M).

    Both are scores over the temperature; "logit_mse" compares them directly.
    """
    if kind == "logit_mse":
        return (a - b).square().mean(-1)
    log_p, log_r = a.log_softmax(-1), b.log_softmax(-1)
    p, r = log_p.exp(), log_r.exp()
    if kind == "kl":
        return (r * (log_r - log_p)).sum(-1)
    if kind == "reverse_kl":
        return (p * (log_p - log_r)).sum(-1)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p, log_r) - math.log(2)
        return (r * (log_r - log_m) + p * (log_p - log_m)).sum(-1) / 2
    if kind == "mse":
        return (p - r).square().sum(-1)
    return 1 - (p * r).sum(-1) / (p.norm(dim=-1) * r.norm(dim=-1))


_GEOMETRY = (
    "int[]? heads, int[] teacher_heads, Tensor? cos, Tensor? sin, int prefix, bool interleaved, "
    "float scale, int[]? grid, int window, Tensor? pad_value, Tensor? teacher_cos, "
    "Tensor? teacher_sin, int teacher_prefix, bool teacher_interleaved, float teacher_scale, "
    "float temperature, str kind"
)
LIB.define(
    "attention_distill(Tensor q, Tensor k, Tensor v, Tensor teacher_q, Tensor teacher_k, "
    f"{_GEOMETRY}) -> (Tensor out, Tensor loss, Tensor stats)"
)
LIB.define(
    "attention_distill_bwd(Tensor grad_out, Tensor grad_loss, Tensor out, Tensor stats, Tensor q, "
    f"Tensor k, Tensor v, Tensor teacher_q, Tensor teacher_k, {_GEOMETRY}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dpad)"
)


@torch.library.register_fake("kdfast::attention_distill", lib=LIB)
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    heads: list[int] | None,
    teacher_heads: list[int],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, tokens, head_dim = q.shape
    kept, dtype = len(teacher_heads), attention.math_dtype(q.dtype)
    out = q.new_empty((batch, tokens, kept, head_dim)).transpose(1, 2)
    stats = q.new_empty((STATS[rest[-1]], batch, kept, tokens), dtype=dtype)
    return out, q.new_empty((), dtype=dtype), stats


@torch.library.register_fake("kdfast::attention_distill_bwd", lib=LIB)
def _fake_bwd(
    grad_out: Tensor,
    grad_loss: Tensor,
    out: Tensor,
    stats: Tensor,
    q: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, head_dim = q.shape
    dq, dk, dv = (q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2) for _ in range(3))
    pad = rest[-8]
    dpad = q.new_empty(0) if pad is None else torch.empty_like(pad).contiguous()
    return dq, dk, dv, dpad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.tensors, ctx.plain = tensors, [None if i in tensors else x for i, x in enumerate(inputs)]
    out, _, stats = output
    # Maps are recomputed from stats (O(N)); out is needed for the row sums of grad * out only.
    ctx.save_for_backward(out, stats, *(inputs[i] for i in tensors))
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_loss: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    out, stats, *saved = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_loss = stats.new_zeros(()) if grad_loss is None else grad_loss
    inputs = list(ctx.plain)
    for i, tensor in zip(ctx.tensors, saved, strict=True):
        inputs[i] = tensor
    op = torch.ops.kdfast.attention_distill_bwd.default
    dq, dk, dv, dpad = op(grad_out, grad_loss, out, stats, *inputs)
    return dq, dk, dv, *(None,) * 11, None if inputs[14] is None else dpad, *(None,) * 7


def _twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "attention_distill: the fused op has no second derivative; use backend='reference'"
    )


register_gradient("attention_distill", _backward, _setup_context)
register_gradient("attention_distill_bwd", _twice)


if HAS_TRITON:

    @torch.library.impl(LIB, "attention_distill", "CUDA")
    def _cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        from kdfast.kernels.attention_distill import forward

        bring_heads(args[0], args[5])
        bring_heads(args[3], args[6])
        return forward(*args)

    @torch.library.impl(LIB, "attention_distill_bwd", "CUDA")
    def _cuda_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from kdfast.kernels.attention_distill import backward

        return backward(*args)


FUSED_ON = fused_devices("attention_distill")
