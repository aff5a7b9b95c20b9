# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Rope, Window
from kdfast.ops import pruned_attention as op
from kdfast.testing import rotary, run


def make_qkv(batch: int, heads: int, tokens: int, dim: int) -> list[Tensor]:
    return [torch.randn(batch, heads, tokens, dim, dtype=torch.float64) for _ in range(3)]


def test_reference_literal() -> None:
    q = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    k = torch.tensor([[[[math.log(3.0), 0.0], [0.0, math.log(2.0)]]]])
    v = torch.tensor([[[[4.0, 8.0], [0.0, 0.0]]]])
    # Row 0: logits (ln 3, 0), weights 3/4 and 1/4; row 1: logits (0, 2 ln 2), weights 1/5, 4/5.
    got = kdfast.pruned_attention(q, k, v, scale=1.0, backend="reference")
    torch.testing.assert_close(got, torch.tensor([[[[3.0, 6.0], [0.8, 1.6]]]]))
    two = [torch.cat((torch.full_like(x, torch.nan), x), 1) for x in (q, k, v)]
    assert torch.equal(
        kdfast.pruned_attention(*two, heads=[1], scale=1.0, backend="reference"), got
    )


def test_reference_rotation_literal() -> None:
    cos, sin = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    x = torch.tensor([[[[5.0, 6.0, 7.0, 8.0]]]])
    # Pairs (0, 1), (2, 3): 5*1 - 6*10, 6*2 + 5*20, 7*3 - 8*30, 8*4 + 7*40.
    got = op.rotated(x, Rope(cos, sin), None)
    assert got.flatten().tolist() == [-55, 112, -219, 312]
    # Pairs (0, 2), (1, 3): 5*1 - 7*10, 6*2 - 8*20, 7*3 + 5*30, 8*4 + 6*40.
    got = op.rotated(x, Rope(cos, sin, layout="half"), None)
    assert got.flatten().tolist() == [-65, -148, 171, 272]
    x = torch.cat((x, x), 2)
    got = op.rotated(x, Rope(cos, sin, prefix=1), None)
    assert got.flatten().tolist() == [5, 6, 7, 8, -55, 112, -219, 312]
    full = Rope(torch.cat((cos * 9, cos)), torch.cat((sin * 9, sin)), prefix=1)
    assert torch.equal(op.rotated(x, full, None), got)


def test_reference_pads_literal() -> None:
    # One token in a 2 x 2 window: three pads of logit 0 and value 8, one real logit ln 5, value 16.
    q, k, v = torch.tensor([[[[1.0]]]]), torch.tensor([[[[math.log(5.0)]]]]), torch.tensor([16.0])
    window = Window((1, 1), 2, torch.tensor([[8.0]]))
    args = {"scale": 1.0, "backend": "reference"}
    got = kdfast.pruned_attention(q, k, v.view(1, 1, 1, 1), window=window, **args)
    assert got.item() == pytest.approx((5 * 16 + 3 * 8) / 8)
    got = kdfast.pruned_attention(q, k, v.view(1, 1, 1, 1), window=Window((1, 1), 2), **args)
    assert got.item() == 16


def padded_oracle(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *, grid: tuple[int, int], size: int, rope: Rope
) -> Tensor:
    """The long way: zero keys and pad values in every padded place, then attention per window."""
    (h, w), (batch, heads, _, dim) = grid, q.shape
    rows, cols = -(-h // size), -(-w // size)
    shape = (batch, heads, rows * size, cols * size, dim)
    padded = [torch.zeros(shape, dtype=q.dtype) for _ in range(3)]
    padded[2] = pad[:, None, None].expand(shape).clone()
    for full, x in zip(padded, (q, k, v), strict=True):
        full[:, :, :h, :w] = x.unflatten(2, grid)
    out = torch.zeros_like(padded[2])
    for r, c in itertools.product(range(rows), range(cols)):
        here = (
            ...,
            slice(r * size, r * size + size),
            slice(c * size, c * size + size),
            slice(None),
        )
        qw, kw, vw = (x[here].flatten(2, 3) for x in padded)
        qw, kw = op.rotated(qw, rope, None), op.rotated(kw, rope, None)
        weights = (qw @ kw.mT * dim**-0.5).softmax(-1)
        out[here] = (weights @ vw).unflatten(2, (size, size))
    return out[:, :, :h, :w].flatten(2, 3)


@pytest.mark.parametrize(("grid", "size"), [((5, 7), 3), ((4, 4), 2), ((2, 3), 4)])
def test_reference_windows_match_padding(grid: tuple[int, int], size: int) -> None:
    qkv, pad = make_qkv(2, 3, grid[0] * grid[1], 6), torch.randn(3, 6, dtype=torch.float64)
    rope = rotary(size**2, 6)

    def call(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        window = Window(grid, size, p)
        return op.pruned_attention(q, k, v, rope=rope, window=window, backend="reference")

    got = run(call, [*qkv, pad])
    want = run(lambda *x: padded_oracle(*x, grid=grid, size=size, rope=rope), [*qkv, pad])
    for name, a, b in zip("out dq dk dv dpad".split(), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_reference_without_pad_value_crops_windows() -> None:
    q, k, v = make_qkv(1, 1, 6, 4)
    got = kdfast.pruned_attention(q, k, v, window=Window((2, 3), 2), backend="reference")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for tokens in ([0, 1, 3, 4], [2, 5]):
        want = sdpa(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens])
        torch.testing.assert_close(got[:, :, tokens], want)


def test_reference_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in make_qkv(1, 2, 6, 4)]
    pad = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return op.pruned_attention(
            *(q, k, v),
            heads=[1],
            rope=rotary(4, 4, "half"),
            window=Window((2, 3), 2, p),
            backend="reference",
        )

    assert torch.autograd.gradcheck(call, (*leaves, pad))
    call(*leaves, pad).sum().backward()
    for x in (*(leaf.grad for leaf in leaves), pad.grad[None]):
        assert not x[:, 0].any()
        assert x[:, 1].any()


def test_result_layout() -> None:
    q, k, v = make_qkv(2, 3, 5, 4)
    out = kdfast.pruned_attention(q, k, v, heads=[2, 0])
    assert out.shape == (2, 2, 5, 4)
    flat = out.transpose(1, 2).flatten(2)
    assert flat.data_ptr() == out.data_ptr()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(out, sdpa(q, k, v)[:, [2, 0]])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(backend: str) -> None:
    q, k, v = (x.float() for x in make_qkv(1, 2, 9, 16))
    want = kdfast.pruned_attention(*(x.bfloat16() for x in (q, k, v)), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kdfast.pruned_attention(q, k.bfloat16(), v, backend=backend)
        double = kdfast.pruned_attention(q.double(), k.double(), v.double(), backend=backend)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    assert double.dtype == torch.float64


ROPE = rotary(6, 4)
REJECTED = [
    ({"k": torch.zeros(1, 2, 6, 4).double()}, TypeError, "k must be torch.float32 like q"),
    ({"q": torch.zeros(1, 2, 6, 4).int()}, TypeError, "q must be one of float16"),
    ({"v": torch.zeros(1, 2, 5, 4)}, ValueError, r"v must be \(1, 2, 6, 4\) like q"),
    ({"q": torch.zeros(2, 6, 4)}, ValueError, r"q must be \(B, H, N, D\)"),
    ({"k": torch.zeros(1, 2, 6, 4, device="meta")}, ValueError, "k must be on cpu like q"),
    ({"heads": [2]}, ValueError, r"heads must be in \[0, 2\)"),
    ({"heads": [0.5]}, TypeError, "heads must hold ints"),
    ({"rope": rotary(5, 4)}, ValueError, r"rope.cos must be \(6, 4\)"),
    ({"rope": rotary(6, 4, "pairs")}, ValueError, "rope.layout must be one of"),
    ({"rope": Rope(ROPE.cos.requires_grad_(), ROPE.sin)}, NotImplementedError, "get no gradient"),
    ({"window": Window((2, 2), 2)}, ValueError, "must hold N = 6 tokens, got 2 x 2"),
    ({"window": Window((2, 3), 2, torch.zeros(1, 4))}, ValueError, "window.pad_value must be"),
    (
        {"window": Window((2, 3), 2, torch.zeros(2, 4, device="meta"))},
        ValueError,
        "window.pad_value must be on cpu",
    ),
    (
        {"window": Window((2, 3), 2), "rope": rotary(4, 4, prefix=1)},
        ValueError,
        "rope.prefix must be 0 with a window",
    ),
    ({"backend": "fast"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "match"), REJECTED)
def test_rejects(change, error, match) -> None:  # type: ignore[no-untyped-def]
    args = {name: torch.zeros(1, 2, 6, 4) for name in "qkv"} | change
    with pytest.raises(error, match=match):
        kdfast.pruned_attention(args.pop("q"), args.pop("k"), args.pop("v"), **args)
