# SPDX-License-Identifier: Apache-2.0
"""What the ops do at the ends of what their arguments may be: sizes, heads, factors, weights."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Rope, Window
from kdfast.ops.attention_distill import STATS
from kdfast.ops.attention_entropy import attention_entropy

OPS = torch.ops.kdfast
Q = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(1))
NOTHING: Any = (None, None, None, 0, True, 0.3, None, 0, None)  # heads ... pad_value
HUGE = 922337203685477581
BACKENDS = ["fused", "reference"]


def attention(
    q: Tensor = Q,
    heads: Any = None,
    cos: Any = None,
    grid: Any = None,
    window: int = 0,
    pad: Any = None,
) -> Any:
    return OPS.pruned_attention(q, q, q, heads, cos, cos, 0, True, 0.3, grid, window, pad, None, 0)


def distill(
    q: Tensor = Q, heads: Any = None, mapped: Any = (0, 1), temperature: float = 1.0
) -> Any:
    plain = (None, None, 0, True, 0.3)
    return OPS.attention_distill(
        *(q, q, q, q, q, heads, list(mapped)),
        *(*plain, None, 0, None, *plain, temperature, "kl", 0),
    )


@pytest.mark.parametrize("kind", STATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_tokens(kind: str, dtype: torch.dtype, isa: str) -> None:
    q = torch.randn(2, 2, 0, 8, dtype=dtype, requires_grad=True)
    out, loss = kdfast.attention_distill(q, q, q, q, q, kind=kind, temperature=0.5)
    (out.sum() + loss).backward()
    assert out.shape == q.grad.shape == (2, 2, 0, 8) and loss.item() == 0
    for backend in BACKENDS:
        rows, limit = attention_entropy(q, q, backend=backend)
        assert rows.shape == (2, 2, 0) and limit.shape == (0,)
    loss, factors = OPS.attention_logit_mse(q, q, q, q, 0.3, 0.3, None, 0)
    assert loss == 0 and not factors.any()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", STATS)
def test_fp64_student_of_a_half_precision_teacher(low: torch.dtype, kind: str, isa: str) -> None:
    """Rotated values of the teacher are rounded to its type, not cast to the bits of it."""
    q, k, v = (torch.randn(1, 2, 16, 8, dtype=torch.float64) for _ in range(3))
    teacher = [torch.randn(1, 2, 16, 8).to(low) for _ in range(2)]
    angle = torch.rand(16, 8)
    rope = Rope(angle.cos(), angle.sin())
    for temperature in (1.0, 2.0):
        options: Any = {"kind": kind, "rope": rope, "temperature": temperature}
        got, want = (
            kdfast.attention_distill(q, k, v, *teacher, **options, backend=backend)[1].item()
            for backend in BACKENDS
        )
        # fp32 in the reference rotates what is rounded; ours fp64: a last bit of some values.
        assert got == pytest.approx(want, rel=3e-3)


@pytest.mark.parametrize(
    ("grid", "window"),
    [([20, HUGE], 20), ([4, 1], 2**32), ([4, 1], 2**63 - 1), ([2**32, 2**32], 1), ([-2, -2], 1)],
)
def test_products_of_sizes_do_not_wrap(grid: list[int], window: int, compiled: None) -> None:
    table = torch.zeros(0, 8)
    for call in (
        lambda: attention(grid=grid, window=window),
        lambda: attention(grid=grid, window=window, cos=table),
        lambda: OPS.attention_entropy(Q, Q, None, None, 0, True, 0.3, grid, window, False),
        lambda: OPS.attention_logit_mse(Q, Q, Q, Q, 0.3, 0.3, grid, -1),
    ):
        with pytest.raises(ValueError, match="grid must hold 4 tokens|product below 2"):
            call()
    for heads, count in ([0], 2**62), ([0], -1), ([0], 600):
        with pytest.raises(ValueError, match="head_gather: "):
            OPS.head_gather_bwd(Q, heads, 2, 1, count)
    with pytest.raises(ValueError, match="product below"):
        OPS.head_gather(torch.zeros(0, 3), [], 2**62, 0)


def test_heads_do_not_repeat(compiled: None) -> None:
    for call in (
        lambda: attention(heads=[0, 0]),
        lambda: distill(heads=[1, 1]),
        lambda: OPS.head_gather(Q, [0, 0], 1, 1),
        lambda: OPS.head_gather_bwd(Q, [0, 0], 1, 1, 3),
    ):
        with pytest.raises(ValueError, match="not repeat one, got"):
            call()
    out, _, _ = distill(heads=[1, 0], mapped=[0, 0])  # a teacher's head may serve several
    torch.testing.assert_close(out, attention(heads=[1, 0])[0])


def test_what_needs_a_grid(compiled: None) -> None:
    with pytest.raises(ValueError, match="in a call with a grid"):
        attention(pad=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="pads need a grid"):
        OPS.attention_entropy(Q, Q, None, None, 0, True, 0.3, None, 0, True)
    with pytest.raises(ValueError, match="D >= 1"):
        attention(q=Q[..., :0])


def test_a_tensor_on_meta_beside_one_that_is_not(compiled: None) -> None:
    meta = Q.to("meta")
    logits = Q.flatten(0, 2)
    for call in (
        lambda: OPS.pruned_attention(Q, meta, Q, *NOTHING, None, 0),
        lambda: OPS.pruned_attention(
            Q, Q, Q, *NOTHING[:-1], torch.zeros(2, 8, device="meta"), None, 0
        ),
        lambda: OPS.kd_loss(logits, logits.to("meta"), None, 1.0, 0.5, "sum", 0.0, -100, True),
        lambda: OPS.swiglu_norm(logits, logits, logits[0].to("meta"), logits[0], 1e-6),
        lambda: OPS.head_gather_block([Q, meta], [0], 1, [1, 1]),
    ):
        with pytest.raises(ValueError, match=r"on one device, got \['cpu', 'meta'\]"):
            call()
    with pytest.raises(TypeError, match="pruned_attention: q must be a tensor, got NoneType"):
        OPS.pruned_attention(None, meta, meta, *NOTHING, None, 0)


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_scale_that_is_not_finite(scale: float, dtype: torch.dtype, isa: str) -> None:
    shape = (2, 3, 17, 8)
    q, k, v, t = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(4))
    found = []
    for backend in BACKENDS:
        out = kdfast.pruned_attention(q, k, v, heads=[2, 0], scale=scale, backend=backend)
        both = kdfast.attention_distill(q, k, v, t, t, scale=scale, backend=backend)
        teacher = kdfast.attention_distill(q, k, v, t, t, teacher_scale=scale, backend=backend)
        rows, _ = attention_entropy(q, k, scale=scale, backend=backend)
        total = out.float().sum() + both[0].float().sum() + both[1] + teacher[1]
        grads = torch.autograd.grad(total, [q, k, v], retain_graph=True)
        some = torch.autograd.grad(out.float().sum(), [q, k, v])
        found.append([out, *both, *teacher, rows, *grads, *(x[:, [0, 2]] for x in some)])
        assert all(not x[:, 1].any() for x in some)
    for i, (fused, eager) in enumerate(zip(*found, strict=True)):
        assert torch.equal(fused.isnan(), eager.isnan()), i


@pytest.mark.parametrize("kind", STATS)
def test_a_tiny_temperature_leaves_the_largest_scores(kind: str, isa: str) -> None:
    x = [torch.randn(1, 1, 9, 8) for _ in range(5)]
    for temperature in (1e-30, 1e-40, 1e-300):
        same = [*x[:3], *x[:2]]
        for backend in BACKENDS:
            _, loss = kdfast.attention_distill(
                *same, kind=kind, temperature=temperature, backend=backend
            )
            assert loss.item() == pytest.approx(0, abs=1e-6)
        got, want = (
            kdfast.attention_distill(*x, kind=kind, temperature=temperature, backend=backend)[1]
            for backend in BACKENDS
        )
        if want < 1e30:
            torch.testing.assert_close(got, want)
        assert not got.isnan() and not want.isnan()
    with pytest.raises(ValueError, match="temperature must be above 0"):
        distill(temperature=0.0)


def test_raw_losses_refuse_what_has_no_meaning(compiled: None) -> None:
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    options: Any = (1.0, 0.5, "sum", 0.0, -100)
    for wrong in ((0.0, *options[1:]), (-1.0, *options[1:]), (1.0, 0.5, "nonsense", 0.0, -100)):
        with pytest.raises(ValueError, match="temperature must be|reduction is unknown"):
            OPS.kd_loss(s, t, None, *wrong, False)
    with pytest.raises(RuntimeError, match="a single memory location"):
        OPS.kd_loss_(s, s, None, *options)
    layer: Any = (t, *[None] * 5)
    for arguments in ((*options, 0), (*options, -3), (1.0, 0.5, "mean", 0.0, -100, 2)):
        with pytest.raises(ValueError, match="chunk must be at least 1 and reduction"):
            OPS.linear_kd_loss(s, torch.randn(5, 5), None, *layer, *arguments, [False] * 3)
    short: Any = (t[:2], *[None] * 5)
    with pytest.raises(ValueError, match="all else have as many rows"):
        OPS.linear_kd_loss(s, torch.randn(5, 5), None, *short, *options, 2, [False] * 3)
    with pytest.raises(ValueError, match="eps must not be negative"):
        OPS.swiglu_norm(s, s, s[0], s[0], math.nan)


def test_windows_without_room(compiled: None) -> None:
    """A window far larger than its grid has places that fit into int64, and pads."""
    window = Window((2, 2), 2**31, torch.zeros(2, 8))
    got = kdfast.pruned_attention(Q, Q, Q, window=window)
    assert got.isfinite().all() and got.abs().max() < 1e-6  # nearly all weight is on the pads


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_types_that_kernels_do_not_know(dtype: torch.dtype) -> None:
    logits = torch.ones(2, 5, dtype=dtype)
    wide = torch.ones(2, 5)
    for call in (
        lambda: OPS.kd_loss(logits, logits, None, 1.0, 0.5, "sum", 0.0, -100, True),
        lambda: OPS.kd_loss_(logits, logits.clone(), None, 1.0, 0.5, "sum", 0.0, -100),
        lambda: OPS.feature_loss(logits, logits, "mse", "layer", True),
        lambda: OPS.swiglu_norm(logits, logits, wide[0], wide[0], 1e-6),
    ):
        with pytest.raises(TypeError, match="must be floating, got"):
            call()
    # What is only converted may be of any type, and its gradient is of that type.
    weight = torch.ones(5, dtype=dtype)
    _, mean, rstd = OPS.swiglu_norm(wide, wide, weight, weight, 1e-6)
    found = OPS.swiglu_norm_bwd(wide, wide, wide, weight, mean, rstd)
    assert [x.dtype for x in found] == [torch.float32] * 2 + [dtype] * 2
