# SPDX-License-Identifier: Apache-2.0
"""Attention entropy against whole maps in which the pads are tokens like any other."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.models import EVAViT
from kdfast.ops import attention_entropy as op
from kdfast.ops.attention_entropy import attention_entropy
from kdfast.ops.geometry import Rope, Window
from kdfast.pruning import head_scores
from kdfast.testing import assert_no_worse, rotary, tiny_eva

HEADS, HEAD_DIM = 4, 16
tiny = partial(tiny_eva, 0.2)


def score(model: EVAViT, x: Tensor, **kwargs: Any) -> Tensor:
    return torch.stack(head_scores(model, "entropy", [x], progress=False, **kwargs).scores)


def windows(x: Tensor, grid: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) as padded windows (B, H, W, size^2, D), and which of them are real tokens."""
    h, w = grid
    pad = (0, 0, 0, -w % size, 0, -h % size)
    real = F.pad(torch.ones(1, 1, h, w, 1), pad)

    def split(t: Tensor) -> Tensor:
        b, c, rows, cols, d = t.shape
        t = t.view(b, c, rows // size, size, cols // size, size, d)
        return t.transpose(3, 4).reshape(b, c, -1, size * size, d)

    return split(F.pad(x.unflatten(2, grid), pad)), split(real)[0, 0, ..., 0].bool()


def turned(x: Tensor, rope: Rope) -> Tensor:
    pair = x.unflatten(-1, (-1, 2))
    turn = torch.complex(rope.cos[:, ::2], rope.sin[:, ::2])
    return torch.view_as_real(torch.view_as_complex(pair.contiguous()) * turn).flatten(-2)


def explicit_entropy(q: Tensor, k: Tensor, grid: Any, rope: Rope, size: int) -> Tensor:
    """Mean entropy (H,) from whole maps in which the pads are tokens like any other."""
    real = torch.ones(1, q.shape[2], dtype=torch.bool)
    q, k = q[:, :, None], k[:, :, None]
    if size:
        (q, real), (k, _) = (windows(x[:, :, 0], grid, size) for x in (q, k))
    p = (turned(q, rope) @ turned(k, rope).transpose(-1, -2) / math.sqrt(HEAD_DIM)).softmax(-1)
    rows = -(p * p.log()).sum(-1)
    return rows[:, :, real].mean((0, 2))


@pytest.fixture(params=["reference", "fused"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both backends, where the compiled one exists; also what "auto" then takes."""
    if request.param == "fused":
        request.getfixturevalue("compiled")
        if "cpu" not in op.FUSED_ON:
            pytest.skip("attention_entropy has no compiled CPU kernel in this build")
        monkeypatch.setattr(op, "reference", None)
    else:
        monkeypatch.setattr(op, "FUSED_ON", frozenset())
    return str(request.param)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("tile", [1, 1 << 22])
@pytest.mark.parametrize("grid", [(5, 7), (3, 3), (6, 4)])
def test_entropy_of_explicit_maps(
    grid: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "TILE", tile)
    model, x = tiny().eval(), torch.randn(2, 3, 4 * grid[0], 4 * grid[1]).double()
    trace = model.trace(x, qk=True)
    rows = []
    for block, (q, k) in zip(model.blocks, trace.qk, strict=True):
        size = block.attn.window_size
        shape = (size, size) if size else grid
        rows.append(explicit_entropy(q, k, grid, model.rope(shape, q), size))
    want = torch.stack(rows).detach()
    got = score(model, x, important="high", unit="nats")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    limit = torch.tensor([9, 9, grid[0] * grid[1]], dtype=torch.float64).log()[:, None]
    for important, unit, value in (
        ("low", "nats", limit - want),
        ("high", "share", want / limit),
        ("low", "share", 1 - want / limit),
    ):
        got = score(model, x, important=important, unit=unit)
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("backend")
def test_entropy_literals() -> None:
    # Equal keys: log 3. One key far ahead: 0. Two equal ones far ahead: log 2.
    k = torch.tensor([[9.0, 0, 0, 0], [9, 0, 0, 0], [-9, 0, 0, 0]])[None, None]
    q = torch.tensor([[0.0, 0, 0, 0], [-99, 0, 0, 0], [99, 0, 0, 0]])[None, None]
    rows, limit = attention_entropy(q, k)
    assert rows[0, 0].tolist() == pytest.approx([math.log(3), 0, math.log(2)], abs=1e-5)
    assert limit.tolist() == pytest.approx([math.log(3)] * 3)


@pytest.mark.usefixtures("backend")
def test_entropy_of_huge_logits_and_pads() -> None:
    # One real token in a window of four. Its logit drowns in the pads, or they in it.
    window = Window((1, 1), 2, torch.zeros(1, 4))
    x = torch.tensor([900.0, 0, 0, 0])[None, None, None]
    for key, want in ((-x, math.log(3)), (x, 0)):
        assert attention_entropy(x, key, window=window)[0].item() == pytest.approx(want, abs=1e-6)


@pytest.mark.usefixtures("backend")
def test_entropy_counts_pads_only_where_they_are_keys() -> None:
    # A 3 x 3 grid in windows of 2: 4, 2, 2 and 1 real tokens; zero scores, so all keys weigh alike.
    zero = torch.zeros(1, 1, 9, 4)
    for pad, keys in ((torch.zeros(1, 4), (4, 4, 4, 4)), (None, (4, 2, 2, 1))):
        rows, limit = attention_entropy(zero, zero, window=Window((3, 3), 2, pad))
        for token, count in zip((0, 2, 6, 8), keys, strict=True):
            assert rows[0, 0, token].item() == pytest.approx(math.log(count), abs=1e-6)
            assert limit[token].item() == pytest.approx(math.log(count), abs=1e-6)


@pytest.mark.usefixtures("backend")
def test_entropy_of_one_key_is_no_nan() -> None:
    model = tiny(window_block_indexes=())
    for important in ("low", "high"):
        got = score(model, torch.randn(1, 3, 4, 4), important=important)
        assert torch.equal(got, torch.zeros(3, HEADS, dtype=torch.float64))


CASES: dict[str, tuple[tuple[int, ...], Window | None, int]] = {
    "plain": ((2, 3, 37, 24), None, 0),
    "prefix": ((1, 2, 37, 24), None, 1),
    "pads": ((2, 2, 63, 16), Window((7, 9), 4, torch.zeros(2, 16)), 0),
    "cropped": ((2, 2, 63, 16), Window((7, 9), 4), 0),
    "long": ((1, 1, 801, 8), None, 0),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_no_worse_than_the_reference(case: str, dtype: torch.dtype) -> None:
    shape, window, prefix = CASES[case]
    rows = shape[2] if window is None else window.size**2
    rope = rotary(rows, shape[3], prefix=prefix)
    q, k = (torch.randn(shape).to(dtype) for _ in range(2))
    call = lambda a, b, backend: attention_entropy(  # noqa: E731
        a, b, rope=rope, window=window, scale=0.4, backend=backend
    )
    fused, eager = call(q, k, "fused"), call(q, k, "reference")
    exact = call(q.double(), k.double(), "reference")
    assert fused[0].dtype == torch.float32 and torch.equal(fused[1], eager[1])
    assert_no_worse("entropy", fused[0], exact[0], eager[0])


@pytest.mark.usefixtures("compiled")
def test_layouts_threads_and_autocast() -> None:
    packed = torch.randn(2, 9, 2, 3, 16)
    q, k = packed.permute(2, 0, 3, 1, 4)
    want = attention_entropy(q.contiguous(), k.contiguous(), backend="fused")[0]
    strided = torch.randn(2, 3, 16, 9).mT
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(attention_entropy(q, k, backend="fused")[0], want)
        got = attention_entropy(strided, k, backend="fused")[0]
        assert torch.equal(got, attention_entropy(strided.clone(), k, backend="fused")[0])
    empty = attention_entropy(q[:0], k[:0], backend="fused")[0]
    assert empty.shape == (0, 3, 9)


@pytest.mark.usefixtures("compiled")
def test_registration() -> None:
    q, k, table = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4), torch.randn(4, 4)
    call = torch.ops.kdfast.attention_entropy.default
    good = (q, k, table, table, 0, True, 0.5, [2, 3], 2, True)
    torch.library.opcheck(call, good)
    for index, value, match in (
        (1, k[:, :, :5], "of one shape and dtype"),
        (2, table[:3], "cos and sin must be"),
        (7, [2, 4], "grid must hold 6 tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            call(*good[:index], value, *good[index + 1 :])
    with pytest.raises(TypeError, match="k must be torch.float32 like q"):
        attention_entropy(q, k.half())
    with pytest.raises(ValueError, match="backend must be one of"):
        attention_entropy(q, k, backend="fast")


def test_says_why_it_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "FUSED_ON", frozenset())
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="no compiled kernel for cpu"):
        attention_entropy(q, q, backend="fused")
