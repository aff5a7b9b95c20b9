# SPDX-License-Identifier: Apache-2.0
"""The additive bias of pruned_attention: reference, every instruction set, and who gets what."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import Window
from kdfast.ops._library import EXTENSION
from kdfast.testing import AttentionCase as Case
from kdfast.testing import assert_no_worse, run

ISAS = EXTENSION.testable_isas() if EXTENSION else ["generic"]
LOW = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "dq", "dk", "dv", "dbias")


CASES = {
    "swin": Case((8, 3, 49, 32), biases=4, masked=True),
    "beit": Case((4, 3, 197, 64), biases=1),
    "odd": Case((4, 3, 37, 23), (2, 0), biases=2),
    "rope": Case((2, 2, 50, 72), layout="interleaved", biases=2, masked=True, scale=-0.3),
    "one": Case((2, 1, 1, 16), biases=1),
    "long": Case((2, 1, 700, 32), (0,), biases=1),
    "each": Case((2, 2, 33, 80), biases=2, masked=True),
}


def test_reference_literal() -> None:
    q = torch.tensor([[[[1.0], [1.0]]]])
    k = torch.tensor([[[[math.log(3.0)], [0.0]]]])
    v = torch.tensor([[[[8.0], [16.0]]]])
    bias = torch.tensor([[[0.0, math.log(5.0)], [-math.inf, 1.0]]])
    # Row 0: weights 3 and 1 * 5; row 1: nothing but the second token.
    got = kdfast.pruned_attention(q, k, v, scale=1.0, bias=bias, backend="reference")
    torch.testing.assert_close(got, torch.tensor([[[[13.0], [16.0]]]]))
    # Images take the biases in turn, heads their own.
    two = torch.stack((torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)))
    two[1, 2] = bias[0]
    q, k, v = (x.expand(4, 3, 2, 1) for x in (q, k, v))
    out = kdfast.pruned_attention(q, k, v, scale=1.0, heads=[2, 1], bias=two, backend="reference")
    plain = torch.tensor([[10.0], [10.0]])
    torch.testing.assert_close(out[1::2, 0], got[0].expand(2, 2, 1))
    for rest in (out[::2, 0], out[:, 1]):
        torch.testing.assert_close(rest, plain.expand_as(rest))


def test_reference_is_torchs_mask() -> None:
    case = CASES["swin"]
    got = run(case.call("reference"), case.inputs())

    def torchs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, bias.repeat(2, 1, 1, 1))

    for name, a, b in zip(NAMES, got, run(torchs, case.inputs()), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    assert not got[0][:, 0, 24].any()


def test_reference_gradcheck() -> None:
    case = Case((4, 2, 3, 4), (1,), layout="interleaved", biases=2)
    leaves = [x.requires_grad_() for x in case.inputs()]
    assert torch.autograd.gradcheck(case.call("reference"), leaves)
    case.call("reference")(*leaves).sum().backward()
    assert leaves[3].grad is not None
    assert not leaves[3].grad[:, 0].any()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fused_is_no_worse(name: str, dtype: torch.dtype, isa: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype)
    fused, eager = (run(case.call(b), inputs) for b in ("fused", "reference"))
    exact = run(case.call("reference"), [x.double() for x in inputs])
    for label, *triple in zip(NAMES, fused, exact, eager, strict=True):
        assert_no_worse(f"{name} {label} {dtype} {isa}", *triple)
    assert fused[4].dtype == dtype


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", CASES)
def test_fused_is_exact_in_double(name: str) -> None:
    case = CASES[name]
    fused, eager = (run(case.call(b), case.inputs()) for b in ("fused", "reference"))
    for label, a, b in zip(NAMES, fused, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda m, n=label: f"{n}: {m}")


@pytest.mark.usefixtures("compiled")
def test_gradcheck() -> None:
    case = Case((4, 2, 3, 4), (1,), layout="interleaved", biases=2)
    assert torch.autograd.gradcheck(case.call("fused"), [x.requires_grad_() for x in case.inputs()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["swin", "long", "odd"])
def test_threads_change_no_bit(name: str, dtype: torch.dtype, isa: str) -> None:
    case, results = CASES[name], []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        results.append(run(case.call("fused"), case.inputs(dtype)))
    for other in results[1:]:
        for label, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), label


def test_rows_without_a_score(isa: str) -> None:
    case = Case((2, 2, 20, 16), biases=1)
    q, k, v, bias = case.inputs(torch.float32)
    bias[0, 1, 3:5] = -math.inf
    out, dq, dk, dv, dbias = run(case.call("fused"), [q, k, v, bias])
    for x in (out[:, 1, 3:5], dq[:, 1, 3:5], dbias[:, 1, 3:5]):
        assert not x.any()
    assert out[:, 1, 5].all()
    for x in (dk, dv):
        assert torch.isfinite(x).all()


def test_extreme_bias(isa: str) -> None:
    # Images enough that the largest error of eager, too, is no matter of luck.
    case = Case((8, 2, 37, 16), biases=1)
    q, k, v, bias = case.inputs(torch.float32)
    bias = bias * 1e4
    # What transformers masks with, here and there and a row of it, which weighs all keys alike.
    bias[0, 0, :, ::3] = torch.finfo(torch.float32).min
    bias[0, 1, 5] = torch.finfo(torch.float32).min
    fused, eager = (run(case.call(b), [q, k, v, bias]) for b in ("fused", "reference"))
    exact = run(case.call("reference"), [x.double() for x in (q, k, v, bias)])
    for label, *triple in zip(NAMES, fused, exact, eager, strict=True):
        assert_no_worse(f"{label} {isa}", *triple)
    torch.testing.assert_close(fused[0][0, 1, 5], v[0, 1].mean(0))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_layouts_and_dtypes_of_the_bias(dtype: torch.dtype, isa: str) -> None:
    case = CASES["odd"]
    q, k, v, bias = case.inputs(dtype)
    attention = case.call("fused")
    want = attention(q, k, v, bias)
    for view in (bias.mT.contiguous().mT, torch.stack((bias, bias), -1)[..., 0], bias.float()):
        assert torch.equal(attention(q, k, v, view), want)
    assert torch.equal(attention(q, k, v, bias.repeat(2, 1, 1, 1)), want)
    first = attention(q, k, v, bias[:1])
    assert torch.equal(attention(q, k, v, bias[0]), first)
    assert torch.equal(attention(q, k, v, bias[:1].expand(4, -1, -1, -1)), first)
    # One mask of keys for all heads and queries, never copied out.
    keys = bias[:, :1, :1]
    whole = keys.expand_as(bias)
    assert torch.equal(attention(q, k, v, whole), attention(q, k, v, whole.contiguous()))


def test_strides_of_the_rest(isa: str) -> None:
    case = CASES["odd"]
    plain = case.inputs(torch.float32)
    qkv = torch.stack([x.transpose(1, 2) for x in plain[:3]], 2)
    packed = [x.transpose(1, 2) for x in qkv.unbind(2)]
    weight = torch.randn(4, 2, 37, 23)

    def gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(case.call("fused")(*leaves), leaves, weight)

    bias = torch.stack((plain[3], plain[3]), -1)[..., 0]
    for a, b in zip(gradients(plain), gradients([*packed, bias]), strict=True):
        assert torch.equal(a, b)


def test_bias_without_gradient(isa: str) -> None:
    case = CASES["each"]
    want = run(case.call("fused"), case.inputs(torch.float32))
    *leaves, bias = case.inputs(torch.float32)
    got = run(lambda q, k, v: case.call("fused")(q, k, v, bias), leaves)
    for a, b in zip(got, want[:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("compiled")
def test_gradient_is_summed_in_fp32() -> None:
    # Each of 4096 images adds the same to a bias of one: in fp16, sums would stop growing.
    q, k = torch.zeros(4096, 1, 2, 16).half(), torch.zeros(4096, 1, 2, 16).half()
    v = torch.zeros(4096, 1, 2, 16).half()
    v[:, :, 0, 0] = 1
    bias = torch.zeros(1, 2, 2, requires_grad=True)
    kdfast.pruned_attention(q, k, v, bias=bias, backend="fused").float().sum().backward()
    assert bias.grad is not None
    # dS = P (dP - delta) = 1/2 (1 - 1/2) and 1/2 (0 - 1/2), 4096 times.
    assert bias.grad[0].tolist() == [[1024.0, -1024.0], [1024.0, -1024.0]]


@pytest.mark.usefixtures("compiled")
def test_autocast() -> None:
    case = CASES["each"]
    q, k, v, bias = case.inputs(torch.float32)
    low = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.call("fused")(q, k, v, bias)
        half = case.call("fused")(q, k, v, bias.half())
    assert torch.equal(got, case.call("fused")(*low, bias))
    assert torch.equal(half, case.call("fused")(*low, bias.half().bfloat16()))


@pytest.mark.usefixtures("compiled")
def test_registration() -> None:
    case = Case((4, 2, 6, 4), biases=2)
    q, k, v, bias = (x.requires_grad_() for x in case.inputs(torch.float32))
    geometry = ([1], None, None, 0, True, 0.5, None, 0, None, bias)
    attention = torch.ops.kdfast.pruned_attention.default
    torch.library.opcheck(attention, (q, k, v, *geometry, 0))
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    geometry = (*geometry[:-1], bias)
    out, lse = attention(q, k, v, *geometry, 0)
    bwd = torch.ops.kdfast.pruned_attention_bwd.default
    for wanted in (True, False):
        torch.library.opcheck(bwd, (torch.randn_like(out), q, k, v, out, lse, *geometry, wanted, 0))
    with pytest.raises(ValueError, match="bias_grad needs a bias"):
        bwd(torch.randn_like(out), q, k, v, out, lse, *geometry[:-1], None, True, 0)
    for wrong in (bias[:, :1], bias[..., :5], bias[:, 0], bias.repeat(3, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"bias must be \(G, H, N, N\)"):
            attention(q, k, v, *geometry[:-1], wrong, 0)
    with pytest.raises(ValueError, match="bias must be None in a call with a window"):
        attention(q, k, v, None, None, None, 0, True, 0.5, [2, 3], 2, None, bias, 0)


@pytest.mark.usefixtures("compiled")
def test_compile() -> None:
    case = CASES["odd"]
    inputs = case.inputs(torch.float32)
    compiled = torch.compile(case.call("fused"), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs), run(case.call("fused"), inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", [(0, 2, 4, 16), (2, 0, 4, 16), (1, 2, 0, 16)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    results = run((case := Case(shape, biases=1)).call("fused"), case.inputs(torch.float32))
    assert results[0].shape == shape
    assert results[4].shape == (1, shape[1], shape[2], shape[2])
    assert not results[4].any()


REJECTED = [
    (torch.zeros(2, 6, 6).double(), TypeError, r"bias must be torch.float16 like q or torch.float"),
    (torch.zeros(2, 6, 6).bfloat16(), TypeError, r"bias must be torch.float16 like q or torch.f"),
    (torch.zeros(6, 6), ValueError, r"bias must be \(H, N, N\) or \(G, H, N, N\) with H = 2"),
    (torch.zeros(1, 6, 6), ValueError, r"bias must be \(H, N, N\) or .* got \(1, 1, 6, 6\)"),
    (torch.zeros(2, 6, 5), ValueError, "bias must be .* and N = 6"),
    (torch.zeros(3, 2, 6, 6), ValueError, "bias must have a G that divides B = 4, got 3"),
    (torch.zeros(0, 2, 6, 6), ValueError, "bias must have a G that divides B = 4, got 0"),
    (torch.zeros(2, 6, 6, device="meta"), ValueError, "bias must be on cpu like q, got meta"),
]


@pytest.mark.parametrize(("bias", "error", "match"), REJECTED)
def test_rejects(bias: Tensor, error: type[Exception], match: str) -> None:
    q = torch.zeros(4, 2, 6, 4).half()
    with pytest.raises(error, match=match):
        kdfast.pruned_attention(q, q, q, bias=bias)


def test_rejects_windows() -> None:
    q = torch.zeros(4, 2, 6, 4)
    with pytest.raises(NotImplementedError, match="fold the windows into the batch"):
        kdfast.pruned_attention(q, q, q, window=Window((2, 3), 2), bias=torch.zeros(2, 6, 6))


@pytest.mark.usefixtures("compiled")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    turns=st.integers(1, 3),
    biases=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 70),
    half_dim=st.integers(1, 40),
    rope=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float64, *LOW]),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 99),
)
def test_random_calls(
    turns: int,
    biases: int,
    heads: int,
    tokens: int,
    half_dim: int,
    rope: bool,
    masked: bool,
    dtype: torch.dtype,
    isa: str,
    seed: int,
) -> None:
    kept = torch.randperm(heads, generator=torch.Generator().manual_seed(seed)).tolist()
    shape = (turns * biases, heads, tokens, 2 * half_dim)
    layout = "interleaved" if rope else None
    kept = tuple(kept[: 1 + seed % heads])
    case = Case(shape, kept, layout=layout, biases=biases, masked=masked)
    inputs = case.inputs(dtype)
    before = EXTENSION.cpu_isa()
    EXTENSION.set_cpu_isa(isa)
    fused = run(case.call("fused"), inputs)
    EXTENSION.set_cpu_isa(before)
    exact = run(case.call("reference"), [x.double() for x in inputs])
    # A wrong row or column is an error of order one, so rounding is not judged here.
    eager = run(case.call("reference"), [x.bfloat16() for x in case.inputs()])
    together = [torch.cat([x.flatten() for x in xs]) for xs in (fused, exact, eager)]
    assert_no_worse(f"{case} {isa}", *together)
