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

from kdfast.ops import pruned_attention as attention
from kdfast.ops._attention_args import geometry_of, geometry_tensors
from kdfast.ops._autocast import without_autocast
from kdfast.ops._checks import check_tensors, head_list
from kdfast.ops._distill_args import (
    Distillation,
    check_sides,
    teacher_head_list,
    turned_heads,
)
from kdfast.ops._distill_routes import by_gram, by_kernel, composed, composed_pays, gram_pays
from kdfast.ops._divergence import weighted
from kdfast.ops._library import (
    DEFAULT_BACKEND,
    LIB,
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
from kdfast.ops._watch import watcher
from kdfast.ops.geometry import Rope, Window

# The most that scores are multiplied with. Near 0 a temperature leaves nothing of a map but its
# largest scores, and any large factor does that; repeated in csrc/cpu/attention_distill.cpp.
COLD = {torch.float32: 1e30, torch.float64: 1e300}
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
    not kept; never the teacher. The fused op keeps O(N) values for its backward; gradients that are
    to be differentiated again come from the reference, which holds the maps. Deterministic: yes.
    Source: arXiv 2002.10957 (KL of attention maps); arXiv 1909.10351 (MSE of attention scores).
    """
    names = ("q", "k", "v", "teacher_q", "teacher_k")
    check_tensors("attention_distill", names, q, k, v, teacher_q, teacher_k)
    device = q.device.type
    context, tensors = without_autocast(device, q, k, v, teacher_q, teacher_k)
    q, k, v, teacher_q, teacher_k = tensors
    teacher_rope = check_sides(q, k, v, teacher_q, teacher_k, rope, window, teacher_rope)
    if kind not in STATS:
        raise ValueError(f"attention_distill: kind must be one of {tuple(STATS)}, got {kind!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"attention_distill: temperature must be above 0, got {temperature}")
    kept = None if heads is None else head_list("attention_distill", "heads", heads, q.shape[1])
    count = q.shape[1] if kept is None else len(kept)
    call = Distillation(
        *(q, k, v, teacher_q.detach(), teacher_k.detach()),
        heads=kept,
        teacher_heads=teacher_head_list(teacher_heads, count, teacher_q.shape[1]),
        rope=rope,
        window=window,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        teacher_rope=teacher_rope,
        teacher_scale=teacher_q.shape[3] ** -0.5 if teacher_scale is None else float(teacher_scale),
        temperature=temperature,
        kind=kind,
    )
    reason = why_not(q, teacher_q)
    given = (*tensors, *geometry_tensors(rope, window), *geometry_tensors(teacher_rope, None))
    compiled = device in FUSED_ON
    fused = use_fused("attention_distill", backend, reason, compiled=compiled, given=given)
    with context:
        if not fused and ((backend or DEFAULT_BACKEND) == "reference" or watcher(*given)):
            return by_maps(call)
        # Few channels against many tokens: less work than the kernel has.
        if gram_pays(call):
            return by_gram(call, fused)
        if fused:
            return by_kernel(call)
        # Without a kernel, whole maps as long as they fit.
        return composed(call) if composed_pays(call) else by_maps(call)


def why_not(q: Tensor, teacher_q: Tensor) -> str | None:
    """The reason why the compiled kernel cannot run this input, or None."""
    if q.device.type == "cuda":
        return attention.why_not(q) or attention.why_not(teacher_q)
    return not_compiled("attention_distill", q.device, FUSED_ON)


def by_maps(call: Distillation) -> tuple[Tensor, Tensor]:
    """Both results by their references, which hold whole attention maps."""
    student = attention_scores(call.q, call.k, call.heads, call.rope, call.scale, call.window)
    teacher = attention_scores(
        *(call.teacher_q, call.teacher_k, call.teacher_heads),
        *(call.teacher_rope, call.teacher_scale, call.window),
    )
    out = attention.reference(
        call.q, call.k, call.v, call.heads, call.rope, call.scale, call.window
    )
    return out, reference(student, teacher, call.kind, call.temperature)


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
    q, k = (x.to(dtype) for x in turned_heads(q, k, heads, rope, window))
    groups = [(torch.arange(q.shape[2], device=q.device), 0)]
    if window is not None:
        live = window.pad_value is not None
        groups = [
            (window.token_index(s, q.device), window.pads(s) if live else 0) for s in window.spans()
        ]
    return [(scale * q[:, :, i] @ k[:, :, i].transpose(-1, -2), pads) for i, pads in groups]


def reference(
    student: Sequence[tuple[Tensor, int]],
    teacher: Sequence[tuple[Tensor, int]],
    kind: str,
    temperature: float = 1.0,
) -> Tensor:
    """The specification: mean row distance of the maps of ``attention_scores`` at temperature."""
    total, rows = student[0][0].new_zeros(()), 0
    for (a, pads), (b, _) in zip(student, teacher, strict=True):
        # A padded key is a live key of logit 0 on both sides.
        live = 0 if kind == "logit_mse" else pads
        a, b = F.pad(a, (0, live)), F.pad(b.to(a.dtype), (0, live))
        distance = row_distance(a, b, kind, temperature)
        total, rows = total + distance.sum(), rows + distance.numel()
    return total / max(rows, 1)


def row_distance(a: Tensor, b: Tensor, kind: str, temperature: float = 1.0) -> Tensor:
    """(..., N) distance of the rows of softmax(b) (teacher) and softmax(a) (student), (..., N, M).

    Both are scores, not yet over the temperature; "logit_mse" compares them directly.
    """
    inverse = min(1 / temperature, COLD[a.dtype])
    if kind == "logit_mse":
        return ((a - b) * inverse).square().mean(-1)
    if temperature != 1 and a.shape[-1]:
        a, b = ((x - x.amax(-1, keepdim=True).detach()) * inverse for x in (a, b))
    log_p, log_r = a.log_softmax(-1), b.log_softmax(-1)
    p, r = log_p.exp(), log_r.exp()
    if kind == "kl":
        return weighted(r, log_r - log_p).sum(-1)
    if kind == "reverse_kl":
        return weighted(p, log_p - log_r).sum(-1)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p, log_r) - math.log(2)
        return (weighted(r, log_r - log_m) + weighted(p, log_p - log_m)).sum(-1) / 2
    if kind == "mse":
        return (p - r).square().sum(-1)
    return 1 - (p * r).sum(-1) / (p.norm(dim=-1) * r.norm(dim=-1))


_GEOMETRY = (
    "int[]? heads, int[] teacher_heads, Tensor? cos, Tensor? sin, int prefix, bool interleaved, "
    "float scale, int[]? grid, int window, Tensor? pad_value, Tensor? teacher_cos, "
    "Tensor? teacher_sin, int teacher_prefix, bool teacher_interleaved, float teacher_scale, "
    "float temperature, str kind, int products"
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


@register_fake("attention_distill")
def _fake(
    *, q: Tensor, teacher_heads: list[int], kind: str, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kept, dtype = q.shape[0], len(teacher_heads), attention.math_dtype(q.dtype)
    tokens, head_dim = q.shape[2:]
    out = q.new_empty((batch, tokens, kept, head_dim)).transpose(1, 2)
    stats = q.new_empty((STATS[kind], batch, kept, tokens), dtype=dtype)
    return out, q.new_empty((), dtype=dtype), stats


@register_fake("attention_distill_bwd")
def _fake_bwd(
    *, q: Tensor, pad_value: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, head_dim = q.shape
    dq, dk, dv = (q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2) for _ in range(3))
    dpad = q.new_empty(0) if pad_value is None else torch.empty_like(pad_value).contiguous()
    return dq, dk, dv, dpad


@register_flops("attention_distill")
def _flops(**given: Any) -> int:
    student, teacher = _products(**given)
    return 2 * student + teacher


@register_flops("attention_distill_bwd")
def _flops_bwd(**given: Any) -> int:
    student, teacher = _products(**given)
    return 5 * student + teacher  # scores of both again, and four gradients


def _products(
    *,
    q: Sequence[int],
    teacher_q: Sequence[int],
    teacher_heads: list[int],
    grid: list[int] | None,
    window: int,
    **_: Any,
) -> tuple[int, int]:
    """Operations of one product of queries and keys, of the student and of the teacher."""
    student = attention.products(q, teacher_heads, grid, window)
    return student, student // q[3] * teacher_q[3] if q[3] else 0


def _setup_context(ctx: Any, given: Any, output: tuple[Tensor, ...]) -> None:
    out, loss, stats = output
    # Maps are recomputed from stats (O(N)); out is needed for the row sums of grad_out * out only.
    ctx.save_for_backward(
        *(out, stats, given.q, given.k, given.v, given.teacher_q, given.teacher_k),
        *(given.cos, given.sin, given.pad_value, given.teacher_cos, given.teacher_sin),
    )
    # What stands between these tensors in the schema.
    ctx.heads = given.heads, given.teacher_heads
    ctx.plain = given.prefix, given.interleaved, given.scale, given.grid, given.window
    ctx.teacher_plain = given.teacher_prefix, given.teacher_interleaved, given.teacher_scale
    ctx.distance = given.temperature, given.kind
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _call_of(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, pad_value: Tensor | None, others: Sequence[Any]
) -> Distillation:
    """The call of a backward pass; ``others`` are its teacher_q, teacher_k and tables."""
    teacher_q, teacher_k, cos, sin, teacher_cos, teacher_sin = others
    prefix, interleaved, scale, grid, size = ctx.plain
    rope, window = geometry_of(cos, sin, prefix, interleaved, grid, size, pad_value)
    prefix, interleaved, teacher_scale = ctx.teacher_plain
    teacher_rope, _ = geometry_of(teacher_cos, teacher_sin, prefix, interleaved, None, 0, None)
    temperature, kind = ctx.distance
    return Distillation(
        *(q, k, v, teacher_q, teacher_k),
        *(ctx.heads[0], ctx.heads[1], rope, window, scale),
        *(teacher_rope, teacher_scale, temperature, kind),
    )


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_loss: Tensor | None, _: Tensor | None
) -> dict[str, Tensor | None]:
    if grad_out is None and grad_loss is None:
        return {}
    out, stats, *sides, cos, sin, pad_value, teacher_cos, teacher_sin = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = dict(zip(("q", "k", "v", "pad_value"), (*sides[:3], pad_value), strict=True))

        others = *sides[3:], cos, sin, teacher_cos, teacher_sin

        def outputs(**given: Any) -> tuple[Tensor, Tensor]:
            return by_maps(_call_of(ctx, **given, others=others))

        return second_derivative(outputs, inputs, [grad_out, grad_loss])
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_loss = stats.new_zeros(()) if grad_loss is None else grad_loss
    op = torch.ops.kdfast.attention_distill_bwd.default
    dq, dk, dv, dpad = op(
        *(grad_out, grad_loss, out, stats, *sides, *ctx.heads),
        *(cos, sin, *ctx.plain, pad_value),
        *(teacher_cos, teacher_sin, *ctx.teacher_plain, *ctx.distance, products_of(sides[0])),
    )
    return {"q": dq, "k": dk, "v": dv, "pad_value": None if pad_value is None else dpad}


register_gradient("attention_distill", _backward, _setup_context)
forbid_second_derivative("attention_distill_bwd", "attention_distill")

# `products` is the choice of a CPU.
_cuda = register_launcher("attention_distill", "attention_distill.forward", 1)
_cuda_bwd = register_launcher("attention_distill_bwd", "attention_distill.backward", 1)
FUSED_ON = fused_devices("attention_distill")
