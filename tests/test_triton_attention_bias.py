# SPDX-License-Identifier: Apache-2.0
"""The bias of pruned_attention in the Triton kernels, in the interpreter, against the reference."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import Window
from kdfast.ops import pruned_attention as op
from kdfast.testing import assert_no_worse, interpreted_kernels, rotary, run

kernels = interpreted_kernels("pruned_attention")
bias_kernels = __import__("kdfast.kernels._attention_bias", fromlist=["_attention_bias"])
pytestmark = pytest.mark.interpret
NAMES = ("out", "dqkv", "dbias")


class Launch(torch.autograd.Function):
    """The functions registered for CUDA, called on CPU tensors with the op's own arguments."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *args: Any) -> Tensor:
        out, lse = op._cuda(q, k, v, *args, bias)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        ctx.args = args
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *saved, bias = ctx.saved_tensors
        dq, dk, dv, dpad, dbias = op._cuda_bwd(grad, *saved, *ctx.args, bias, True)
        assert dpad.numel() == 0
        return dq, dk, dv, dbias, *(None,) * len(ctx.args)


@dataclass(frozen=True)
class Case:
    """One call: shape (B, H, N, D), number of biases, kept heads, rope, and masked entries."""

    shape: tuple[int, int, int, int]
    biases: int = 1
    heads: tuple[int, ...] | None = None
    rope: str = ""
    masked: bool = False
    scale: float = 0.3

    def inputs(self) -> list[Tensor]:
        """q, k and v as one projection (B, N, 3, H, D), and the bias; fp64."""
        batch, heads, tokens, dim = self.shape
        packed = torch.randn(batch, tokens, 3, heads, dim, dtype=torch.float64)
        bias = torch.randn(self.biases, heads, tokens, tokens, dtype=torch.float64)
        if self.masked:
            bias.masked_fill_(torch.rand(bias.shape) < 0.3, -math.inf)
            bias[:, -1, tokens // 2] = -math.inf  # a whole row
            bias[:, 0, :, -1] = -100.0
        return [packed, bias]

    def call(self, fused: bool) -> Any:
        batch, _, tokens, dim = self.shape
        rope = rotary(tokens, dim, self.rope) if self.rope else None
        heads = None if self.heads is None else list(self.heads)

        def function(packed: Tensor, bias: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
            if not fused:
                return op.reference(q, k, v, heads, rope, self.scale, None, bias)
            args = op.geometry_args(rope, None, self.scale)
            return Launch.apply(q, k, v, bias, heads, *args)  # type: ignore[no-untyped-call]

        return function


CASES = {
    "one bias": Case((2, 1, 37, 16)),
    "swin": Case((4, 1, 35, 32), 2, masked=True),
    "kept heads": Case((2, 3, 21, 40), 2, (2, 0), masked=True),
    "rope": Case((2, 2, 33, 80), 2, (1,), "interleaved", masked=True, scale=-0.2),
    "half": Case((1, 1, 18, 72), 1, None, "half", masked=True),
    "two blocks": Case((1, 1, 67, 64), masked=True),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), ("half", torch.float16), ("rope", torch.float16)],
    ids=str,
)
def test_no_worse(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    exact = run(case.call(False), inputs := case.inputs())
    low = [x.to(dtype) for x in inputs]
    results = zip(NAMES, run(case.call(True), low), exact, run(case.call(False), low), strict=True)
    for label, *triple in results:
        assert_no_worse(label, *triple)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tokens=st.integers(2, 36),
    dim=st.sampled_from([8, 16, 24, 40]),
    turns=st.integers(1, 2),
    biases=st.integers(1, 2),
    heads=st.permutations([0, 1, 2]),
    rope=st.sampled_from(["", "interleaved", "half"]),
    masked=st.booleans(),
)
def test_any_call(
    tokens: int, dim: int, turns: int, biases: int, heads: list[int], rope: str, masked: bool
) -> None:
    case = Case((turns * biases, 3, tokens, dim), biases, tuple(heads[:2]), rope, masked)
    exact = run(case.call(False), inputs := case.inputs())
    low = [x.float() for x in inputs]
    results = zip(NAMES, run(case.call(True), low), exact, run(case.call(False), low), strict=True)
    for label, *triple in results:
        # Of few numbers the eager error may be small by luck.
        assert_no_worse(label, *triple, eps=2.0**-19)


def test_rows_without_a_score() -> None:
    case = CASES["kept heads"]
    packed, bias = (x.float() for x in case.inputs())
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    args = op.geometry_args(None, None, case.scale)
    out, lse = op._cuda(q, k, v, [2], *args, bias)
    assert not out[:, 0, 10].any()
    assert (lse[:, 0, 10] == math.inf).all()
    assert out[:, 0, 9].all()
    grads = op._cuda_bwd(torch.ones_like(out), q, k, v, out, lse, [2], *args, bias, True)
    assert not grads[0][:, 2, 10].any()
    assert not grads[4][:, 2, 10].any()


def test_large_masks_keep_the_digits() -> None:
    packed, bias = (x.float() for x in CASES["one bias"].inputs())
    bias = bias.mul(8).round() / 8  # exact beside -10000
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    args = op.geometry_args(None, None, 1.0)
    out, lse = op._cuda(q, k, v, None, *args, bias)
    far, same = op._cuda(q, k, v, None, *args, bias - 10000)
    assert torch.equal(out, far)
    assert torch.equal(lse, same)
    want = (q @ k.mT + bias - bias.amax(-1, keepdim=True)).logsumexp(-1)
    torch.testing.assert_close(lse, want)


def test_any_strides_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two images of each bias; a mask of keys that is expanded over heads and queries.
    packed = torch.randn(4, 13, 3, 2, 16)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    args = op.geometry_args(None, None, 0.5)
    mask = torch.randn(2, 1, 1, 13).half().float()
    mask[1, ..., 3] = -math.inf
    wide = mask.expand(2, 2, 13, 13)
    out, lse = op._cuda(q, k, v, [1], *args, wide)
    exact = op.reference(q, k, v, [1], None, 0.5, None, wide)
    torch.testing.assert_close(out, exact)
    grads = op._cuda_bwd(out, q, k, v, out, lse, [1], *args, wide, True)
    assert grads[4].is_contiguous()
    assert not grads[4][:, 0].any()
    # The same bits from a copy, from one whose keys are far apart, and in another dtype.
    for other in (wide.mT.contiguous().mT, wide.half()):
        assert torch.equal(op._cuda(q, k, v, [1], *args, other)[0], out)
        again = op._cuda_bwd(out, q, k, v, out, lse, [1], *args, other, True)
        for a, b in zip(grads, again, strict=True):
            assert torch.equal(a.to(b.dtype), b)
    assert again[4].dtype == torch.float16
    # So far each image was a slice of its own.
    monkeypatch.setattr(bias_kernels, "PROGRAMS", 1)
    whole = op._cuda_bwd(out, q, k, v, out, lse, [1], *args, wide, True)[4]
    torch.testing.assert_close(whole, grads[4])
    dbias = op._cuda_bwd(out, q, k, v, out, lse, [1], *args, wide, False)[4]
    assert dbias.numel() == 0


def test_one_token_and_none() -> None:
    q, bias = torch.randn(2, 1, 1, 16), torch.randn(1, 1, 1, 1)
    args = op.geometry_args(None, None, 1.0)
    out, lse = op._cuda(q, q, q, None, *args, bias)
    torch.testing.assert_close(out, q)
    torch.testing.assert_close(lse, q.square().sum(-1))
    grads = op._cuda_bwd(q, q, q, q, out, lse, None, *args, bias, True)
    torch.testing.assert_close(grads[2], q)
    for grad in (grads[0], grads[1], grads[4]):
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-5, rtol=0)
    for shape in ((0, 2, 4, 16), (1, 2, 0, 16)):
        x, bias = torch.zeros(shape), torch.zeros(1, 2, shape[2], shape[2])
        out, lse = op._cuda(x, x, x, [0], *args, bias)
        assert out.shape == (shape[0], 1, *shape[2:])
        dbias = op._cuda_bwd(out, x, x, x, out, lse, [0], *args, bias, True)[4]
        assert dbias.shape == bias.shape
        assert not dbias.any()


def test_rejected() -> None:
    q, bias = torch.zeros(4, 2, 6, 16), torch.zeros(2, 2, 6, 6)
    args = op.geometry_args(None, None, 1.0)
    for wrong in (bias[:, :1], bias[..., :5], bias[:, 0], bias[:0], bias.repeat(2, 1, 1, 1)[:3]):
        with pytest.raises(ValueError, match=r"bias must be \(G, H, N, N\) with a G that divides"):
            op._cuda(q, q, q, None, *args, wrong)
    with pytest.raises(ValueError, match="bias_grad needs a bias"):
        op._cuda_bwd(q, q, q, q, q, q[..., 0], None, *args, None, True)
    window = op.geometry_args(None, Window((2, 3), 2), 1.0)
    with pytest.raises(ValueError, match="bias must be None in a call with a window"):
        op._cuda(q, q, q, None, *window, bias)


def test_cuda_takes_the_kernel() -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 2, 5, 16, device="cuda", requires_grad=True)
        mask = torch.empty(2, 1, 5, 5, device="cuda")
        bias = mask.expand(2, 2, 5, 5)
        out = kdfast.pruned_attention(q, q, q, bias=bias, backend="fused")
        assert type(out.grad_fn).__name__ == type(kdfast.pruned_attention(q, q, q).grad_fn).__name__
        masked = kdfast.scaled_dot_product_attention(q, q, q, mask)
        assert type(masked.grad_fn).__name__ == type(out.grad_fn).__name__
        with pytest.raises(NotImplementedError, match="bias must be None in a call with a window"):
            kdfast.pruned_attention(q, q, q, window=Window((1, 5), 3), bias=bias)
