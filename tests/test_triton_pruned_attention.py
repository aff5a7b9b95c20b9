# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter, against the reference. bf16 needs a GPU: `tl.dot` of bf16
is wrong in the interpreter."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import Rope, Window
from kdfast.ops import pruned_attention as op
from kdfast.testing import assert_no_worse, interpreted_kernels, rotary, run

kernels = interpreted_kernels("pruned_attention")
common = __import__("kdfast.kernels._common", fromlist=["_common"])
blocks = __import__("kdfast.kernels._blocks", fromlist=["_blocks"])
pytestmark = pytest.mark.interpret


class Launch(torch.autograd.Function):
    """The functions registered for CUDA, called on CPU tensors with the op's own arguments."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pad: Any, *args: Any) -> Any:
        out, lse = op._cuda(q, k, v, *args, pad, None)
        ctx.save_for_backward(q, k, v, out, lse, pad)
        ctx.args = args
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        *saved, pad = ctx.saved_tensors
        dq, dk, dv, dpad, _ = op._cuda_bwd(grad, *saved, *ctx.args, pad, None, False)
        return dq, dk, dv, None if pad is None else dpad, *(None,) * len(ctx.args)


def check(
    shape: tuple[int, int, int, int],
    heads: list[int] | None = None,
    rope: Rope | None = None,
    window: tuple[tuple[int, int], int] | None = None,
    *,
    pad: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
    eps: float = 0.0,
) -> None:
    """Forward and every gradient against the reference, from a packed projection."""
    batch, count, tokens, dim = shape
    packed = torch.randn(batch, tokens, 3, count, dim, dtype=torch.float64)
    pads = torch.randn(count, dim, dtype=torch.float64)
    scale = dim**-0.5 if scale is None else scale

    def call(fused: bool) -> Any:
        def function(packed: Tensor, pads: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
            here = None if window is None else Window(*window, pads if pad else None)
            if not fused:
                return op.reference(q, k, v, heads, rope, scale, here)
            *args, value = op.geometry_args(rope, here, scale)
            return Launch.apply(q, k, v, value, heads, *args)[0]  # type: ignore[no-untyped-call]

        return function

    exact = run(call(False), [packed, pads])
    low = [packed.to(dtype), pads.to(dtype)]
    fused, eager = run(call(True), low), run(call(False), low)
    for name, *triple in zip(("out", "dqkv", "dpad"), fused, exact, eager, strict=True):
        assert_no_worse(name, *triple, eps=max(eps, torch.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((1, 1, 1, 16), None),
        ((2, 3, 37, 40), [2, 0]),
        ((1, 2, 80, 64), [1]),
        ((1, 1, 65, 72), None),
        ((1, 1, 20, 128), None),
        ((1, 1, 19, 10), None),
    ],
    ids=str,
)
def test_global(shape: tuple[int, ...], heads: list[int] | None, dtype: torch.dtype) -> None:
    check(shape, heads, dtype=dtype)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(("dim", "prefix", "left_out"), [(72, 0, 0), (16, 1, 0), (40, 2, 2)])
def test_rope(layout: str, dim: int, prefix: int, left_out: int) -> None:
    check((1, 2, 21, dim), [1], rotary(21 - left_out, dim, layout, prefix))


@pytest.mark.parametrize("dim", [32, 80, 88, 96, 112])
def test_head_dims(dim: int) -> None:
    check((1, 2, 17, dim), [1], rotary(17, dim, "half", 1), dtype=torch.float16)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize(
    ("grid", "size", "layout"), [((4, 5), 3, "half"), ((6, 4), 8, "interleaved"), ((2, 4), 2, "")]
)
def test_windows(grid: tuple[int, int], size: int, layout: str, pad: bool) -> None:
    rope = rotary(size**2, 40, layout) if layout else None
    check((1, 2, grid[0] * grid[1], 40), [1], rope, (grid, size), pad=pad)


def test_large_logits() -> None:
    # exp(200) is infinite, and so would be a weight whose padded key is not masked.
    check((1, 1, 18, 16), scale=-20.0)
    check((1, 1, 6, 16), None, None, ((2, 3), 2), pad=True, scale=20.0)
    # A window without padded keys, all of whose logits are -100: it gives the pad value nothing.
    q, grad, pad = torch.ones(1, 1, 6, 16), torch.ones(1, 1, 6, 16), torch.zeros(1, 16)
    args = op.geometry_args(None, Window((2, 3), 2, pad), -100 / 16)
    out, lse = op._cuda(q, q, q, None, *args, None)
    # Where it has some, they have the weight 1.
    dpad = op._cuda_bwd(grad, q, q, q, out, lse, None, *args, None, False)[3]
    torch.testing.assert_close(dpad, pad + 2)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tokens=st.integers(1, 70),
    dim=st.integers(1, 48),
    count=st.integers(1, 3),
    layout=st.sampled_from(["", "interleaved", "half"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_shape(tokens: int, dim: int, count: int, layout: str, dtype: torch.dtype) -> None:
    dim += dim % 2 if layout else 0
    rope = rotary(tokens, dim, layout) if layout else None
    # Of few numbers the eager error may be small by luck.
    check((1, count, tokens, dim), [count - 1], rope, dtype=dtype, eps=2.0**-19)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.integers(2, 6),
    pad=st.booleans(),
    layout=st.sampled_from(["", "interleaved", "half"]),
    heads=st.permutations([0, 1, 2]),
)
def test_any_window(
    grid: tuple[int, int], size: int, pad: bool, layout: str, heads: list[int]
) -> None:
    rope = rotary(size**2, 16, layout) if layout else None
    check(
        (1, 3, grid[0] * grid[1], 16),
        heads[: 1 + size % 2],
        rope,
        (grid, size),
        pad=pad,
        eps=2.0**-19,
    )


def test_other_heads_are_not_read() -> None:
    # NaN everywhere but in the kept heads.
    packed = torch.full((1, 6, 3, 4, 16), torch.nan)
    packed[:, :, :, [3, 1]] = torch.randn(1, 6, 3, 2, 16)
    pads = torch.full((4, 16), torch.nan)
    pads[[3, 1]] = torch.randn(2, 16)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    args = op.geometry_args(rotary(4, 16), Window((2, 3), 2, pads), 0.5)
    out, lse = op._cuda(q, k, v, [3, 1], *args, None)
    grads = op._cuda_bwd(torch.ones_like(out), q, k, v, out, lse, [3, 1], *args, None, False)
    for x in (out, lse, *(g[:, [3, 1]] for g in grads[:3]), grads[3][[3, 1]]):
        assert x.isfinite().all()
    for x in (*(g[:, [0, 2]] for g in grads[:3]), grads[3][[0, 2]]):
        assert not x.any()


def test_nothing_is_added_atomically() -> None:
    for file in Path(kernels.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not [name for name in names if name.startswith(("atomic", "inline_asm"))], file


def test_lse_and_layouts() -> None:
    q, k, v = (torch.randn(2, 2, 9, 16) for _ in range(3))
    window = Window((3, 3), 2, torch.randn(2, 16))
    args = op.geometry_args(None, window, 0.5)
    out, lse = op._cuda(q, k, v, [1], *args, None)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    # The window in the right column has tokens 2 and 5, and two padded ones of logit 0.
    here = [2, 5]
    logits = 0.5 * q[:, 1, here] @ k[:, 1, here].mT
    want = torch.nn.functional.pad(logits, (0, 2)).logsumexp(-1)
    torch.testing.assert_close(lse[:, 0, here], want)
    # Any stride gives the same bits: a last dimension that is not contiguous, and one of stride 0.
    strided = [x.mT.contiguous().mT for x in (q, k, v)]
    again, _ = op._cuda(*strided, [1], *args, None)
    assert torch.equal(out, again)
    grad = torch.ones(1).expand(2, 1, 9, 16)
    got = op._cuda_bwd(grad, q, k, v, out, lse, [1], *args, None, False)
    want = op._cuda_bwd(grad.contiguous(), *strided, out, lse, [1], *args, None, False)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for x in (*got[:3], got[3][None]):
        assert not x[:, 0].any()
        assert x[:, 1].any()


def test_empty_batch() -> None:
    x = torch.zeros(0, 2, 5, 16)
    args = op.geometry_args(None, None, 1.0)
    out, lse = op._cuda(x, x, x, [0], *args, None)
    assert out.shape == (0, 1, 5, 16)
    grads = op._cuda_bwd(out, x, x, x, out, lse, [0], *args, None, False)
    assert [tuple(g.shape) for g in grads] == [(0, 2, 5, 16)] * 3 + [(0,)] * 2


@pytest.mark.parametrize(("tokens", "share"), [(197, 0.83), (257, 0.75), (577, 0.81), (1600, 0.95)])
@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkdv"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_useful_share(tokens: int, share: float, kernel: str, itemsize: int) -> None:
    for dim in (64, 128):
        tiles = common.choose_tiles(kernel, (tokens,), dim, itemsize)
        assert common.useful_share((tokens,), tiles) >= share


def test_useful_share_of_any_length() -> None:
    for (kernel, width, itemsize), _ in blocks.BLOCKS.items():
        for tokens in (*range(104, 700), *range(700, 5000, 61)):
            tiles = common.choose_tiles(kernel, (tokens,), width or 72, itemsize)
            assert common.useful_share((tokens,), tiles) >= 0.75, (kernel, width, tokens)


def test_useful_share_of_windows() -> None:
    # 40 x 40 tokens in windows of 16: four whole, two and two halves, one quarter.
    lengths = common.window_lengths(1600, (40, 40), 16)
    assert lengths == (256, 256, 128, 256, 256, 128, 128, 128, 64)
    assert common.useful_share(lengths, common.choose_tiles("fwd", lengths, 64, 2)) == 1
    # By hand: 3 blocks of 64 rows and one of 16, the same for columns.
    tiles = common.Tiles(64, 16, 64, 16, 4, 2)
    assert common.useful_share((197,), tiles) == pytest.approx(197**2 / 208**2)


def test_cuda_takes_the_kernel_or_says_why_not() -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 2, 5, 16, device="cuda", requires_grad=True)
        out = kdfast.pruned_attention(q, q, q, heads=[1], backend="fused")
        assert out.shape == (1, 1, 5, 16)
        assert out.grad_fn is not None
        for bad, reason in ((q.double(), "not fp64"), (q.repeat(1, 1, 1, 9), "up to 128, got 144")):
            with pytest.raises(NotImplementedError, match=reason):
                kdfast.pruned_attention(bad, bad, bad, backend="fused")
