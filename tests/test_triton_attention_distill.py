# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter, against the reference."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import Window
from kdfast.ops import _distill_composed
from kdfast.ops import attention_distill as op
from kdfast.ops import pruned_attention as attention
from kdfast.testing import assert_no_worse, interpreted_kernels, rotary, run

kernels = interpreted_kernels("attention_distill")
pytestmark = pytest.mark.interpret


class Launch(torch.autograd.Function):
    """The functions registered for CUDA, called on CPU tensors with the op's own arguments."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        out, loss, stats = op._cuda(*inputs)
        ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(out, stats, *(inputs[i] for i in ctx.tensors))
        return out, loss

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_loss: Tensor) -> Any:
        out, stats, *saved = ctx.saved_tensors
        inputs = list(ctx.plain)
        for i, tensor in zip(ctx.tensors, saved, strict=True):
            inputs[i] = tensor
        dq, dk, dv, dpad = op._cuda_bwd(grad_out, grad_loss, out, stats, *inputs)
        grads = [None] * len(inputs)
        grads[:3] = dq, dk, dv
        grads[14] = None if inputs[14] is None else dpad
        return tuple(grads)


def check(
    kind: str,
    *,
    tokens: int = 21,
    dims: tuple[int, int] = (16, 40),
    temperature: float = 1.0,
    ropes: tuple[str, str] = ("", ""),
    window: tuple[tuple[int, int], int] | None = None,
    pad: bool = False,
    dtype: torch.dtype = torch.float32,
    loss_weight: float = 100.0,
    prefixes: tuple[int, int] = (0, 0),
    eps: float | None = None,
    teacher_dtype: torch.dtype | None = None,
) -> None:
    """Both results and every gradient; three student heads of which two are kept, two teachers."""
    dim, teacher_dim = dims
    double = {"dtype": torch.float64}
    packed = torch.randn(1, tokens, 3, 3, dim, **double)
    pads = torch.randn(3, dim, **double)
    teacher = torch.randn(1, tokens, 2, 2, teacher_dim, **double)
    heads, mapped = [2, 0], [1, 1]
    rows = window[1] ** 2 if window else tokens
    # The rows of the student's prefix are there, those of the teacher's are left out.
    rope = rotary(rows, dim, ropes[0], prefixes[0]) if ropes[0] else None
    teacher_rows = rows - prefixes[1]
    teacher_rope = rotary(teacher_rows, teacher_dim, ropes[1], prefixes[1]) if ropes[1] else None
    scales = dim**-0.5, 2 * teacher_dim**-0.5

    def call(fused: bool) -> Any:
        def function(packed: Tensor, pads: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
            exact = packed.dtype == torch.float64
            goal = teacher.to(packed.dtype if exact or teacher_dtype is None else teacher_dtype)
            tq, tk = (x.transpose(1, 2) for x in goal.unbind(2))
            here = None if window is None else Window(*window, pads if pad else None)
            if fused:
                student = attention.geometry_args(rope, here, scales[0])
                other = attention.geometry_args(teacher_rope, None, scales[1])[:5]
                out, loss = Launch.apply(  # type: ignore[no-untyped-call]
                    q, k, v, tq, tk, heads, mapped, *student, *other, temperature, kind
                )
                return out, loss * loss_weight
            out = attention.reference(q, k, v, heads, rope, scales[0], here)
            a = op.attention_scores(q, k, heads, rope, scales[0] / temperature, here)
            b = op.attention_scores(tq, tk, mapped, teacher_rope, scales[1] / temperature, here)
            return out, op.reference(a, b, kind) * loss_weight

        return function

    # The teacher is rounded first, so that all three see the same one.
    teacher = teacher.to(teacher_dtype or dtype).double()
    low = [packed.to(dtype), pads.to(dtype)]
    fused, exact, eager = run(call(True), low), run(call(False), [packed, pads]), None
    eager = run(call(False), low)
    for name, *triple in zip(("out", "loss", "dqkv", "dpad"), fused, exact, eager, strict=True):
        # The eager error of a single number may be 0 by luck.
        single = 2 * torch.finfo(triple[2].dtype).eps if triple[2].numel() == 1 else None
        assert_no_worse(name, *triple, eps=eps or single)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", op.STATS)
def test_kinds(kind: str, temperature: float) -> None:
    check(kind, temperature=temperature)


@pytest.mark.parametrize("kind", op.STATS)
def test_windows(kind: str) -> None:
    ropes = ("interleaved", "half")
    check(kind, tokens=12, ropes=ropes, window=((3, 4), 3), pad=True, temperature=2.0)


@pytest.mark.parametrize(("ropes", "dims"), [(("half", ""), (16, 40)), (("", "half"), (72, 16))])
def test_ropes_and_head_dims(ropes: tuple[str, str], dims: tuple[int, int]) -> None:
    check("kl", tokens=35, ropes=ropes, dims=dims)
    check("jsd", tokens=6, ropes=ropes, dims=dims, window=((2, 3), 2))


@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_prefixes(kind: str) -> None:
    check(kind, tokens=9, ropes=("interleaved", "half"), dims=(16, 16), prefixes=(1, 2))


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(list(op.STATS)),
    grid=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    size=st.sampled_from([0, 2, 3, 6]),
    dims=st.tuples(*[st.sampled_from([6, 16, 18, 24, 40])] * 2),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    ropes=st.tuples(*[st.sampled_from(["", "interleaved", "half"])] * 2),
)
def test_any_call(
    kind: str,
    grid: tuple[int, int],
    size: int,
    dims: tuple[int, int],
    temperature: float,
    ropes: tuple[str, str],
) -> None:
    window = (grid, size) if size else None
    options: dict[str, Any] = {"tokens": grid[0] * grid[1], "dims": dims, "ropes": ropes}
    # Few numbers, whose eager error may be small by luck, and scores of up to 30.
    options |= {"temperature": temperature, "eps": 2.0**-18}
    check(kind, window=window, pad=size % 2 == 1, **options)


def test_other_heads_are_not_read() -> None:
    x = torch.full((5, 1, 4, 9, 16), torch.nan)
    x[:3, :, 1], x[3:, :, 3] = torch.randn(3, 1, 9, 16), torch.randn(2, 1, 9, 16)
    args = attention.geometry_args(rotary(9, 16), None, 0.25)
    for kind in ("kl", "cosine", "logit_mse"):
        every = (*x, [1], [3], *args, *args[:5], 2.0, kind)
        out, loss, stats = op._cuda(*every)
        grads = op._cuda_bwd(torch.ones_like(out), torch.ones(()), out, stats, *every)
        for y in (out, loss, *(g[:, 1] for g in grads[:3])):
            assert y.isfinite().all()
        for g in grads[:3]:
            assert not g[:, [0, 2, 3]].any()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_composed_calls_at_577_tokens(temperature: float) -> None:
    q, k, v, tq, tk = (torch.randn(1, 1, 577, 16) for _ in range(5))
    args = attention.geometry_args(None, None, 0.25)
    every = (tq, tk, [0], [0], *args, *args[:5], temperature, "kl")
    got = run(lambda q, k: Launch.apply(q, k, v, *every)[1], [q, k])  # type: ignore[no-untyped-call]
    goal, scale = [x.double() for x in (tq, tk)], 0.25 / temperature
    exact = run(
        lambda q, k: _distill_composed.row_kl(q, k, *goal, scale, scale).mean(),
        [q.double(), k.double()],
    )
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str
)
def test_teacher_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check("kl", dtype=dtypes[0], teacher_dtype=dtypes[1], ropes=("half", "half"), dims=(16, 40))


def test_fp16() -> None:
    check("kl", dtype=torch.float16)


def test_equal_maps_cost_nothing() -> None:
    q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
    args = attention.geometry_args(None, None, 0.25)
    for kind in op.STATS:
        every = (q, k, v, q, k, None, [0, 1], *args, *args[:5], 1.5, kind)
        out, loss, stats = op._cuda(*every)
        assert stats.shape == (op.STATS[kind], 2, 2, 20)
        torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)
        grads = op._cuda_bwd(torch.zeros_like(out), torch.ones(()), out, stats, *every)
        for grad in grads[:3]:
            torch.testing.assert_close(grad, torch.zeros_like(q), rtol=0, atol=1e-8)


def test_constants_are_the_op_s() -> None:
    assert kernels.PLANES == op.STATS


def test_empty_batch() -> None:
    x = torch.zeros(0, 2, 5, 16)
    args = attention.geometry_args(None, None, 1.0)
    every = (x, x, x, x, x, None, [0, 1], *args, *args[:5], 1.0, "kl")
    out, loss, stats = op._cuda(*every)
    assert loss == 0
    grads = op._cuda_bwd(out, loss, out, stats, *every)
    assert [tuple(g.shape) for g in grads] == [(0, 2, 5, 16)] * 3 + [(0,)]


def test_cuda_takes_the_kernel_or_says_why_not() -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 2, 5, 16, device="cuda", requires_grad=True)
        out, loss = kdfast.attention_distill(q, q, q, q, q, backend="fused")
        assert out.grad_fn is not None
        assert loss.grad_fn is not None
        wide = torch.empty(1, 2, 5, 144, device="cuda")
        with pytest.raises(NotImplementedError, match="up to 128, got 144"):
            kdfast.attention_distill(q, q, q, wide, wide, backend="fused")
