# SPDX-License-Identifier: Apache-2.0
"""kdfast.scaled_dot_product_attention: torch's signature, fused where it is the same thing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.ops import sdpa
from kdfast.testing import assert_no_worse, run

FUSED = "kdfast.ops.sdpa.pruned_attention"


def qkv(dtype: torch.dtype = torch.float32, heads: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, heads, 13, 16, generator=generator).to(dtype) for _ in range(3)]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    real = sdpa.pruned_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(FUSED, spy)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fused_call(dtype: torch.dtype, scale: float | None, compiled: None, fused_calls) -> None:  # type: ignore[no-untyped-def]
    inputs = qkv(dtype)
    ours = run(lambda *x: kdfast.scaled_dot_product_attention(*x, scale=scale), inputs)
    theirs = run(lambda *x: F.scaled_dot_product_attention(*x, scale=scale), inputs)
    exact = run(
        lambda *x: F.scaled_dot_product_attention(*x, scale=scale), [x.double() for x in inputs]
    )
    for name, *triple in zip(("out", "dq", "dk", "dv"), ours, exact, theirs, strict=True):
        assert_no_worse(name, *triple)
    assert len(fused_calls) == 1


UNFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "causal": ({"is_causal": True}, "not causal"),
    "dropout": ({"dropout_p": 0.5}, "dropout_p=0.5"),
}


@pytest.mark.parametrize("case", UNFUSED)
def test_other_calls_are_torchs(case: str, fused_calls) -> None:  # type: ignore[no-untyped-def]
    options, reason = UNFUSED[case]
    inputs = qkv()
    torch.manual_seed(1)
    want = F.scaled_dot_product_attention(*inputs, **options)
    torch.manual_seed(1)
    assert torch.equal(kdfast.scaled_dot_product_attention(*inputs, **options), want)
    assert not fused_calls
    with pytest.raises(NotImplementedError, match=f"cannot run here: .*{reason}"):
        kdfast.scaled_dot_product_attention(*inputs, **options, backend="fused")


ROWS = torch.linspace(-1, 1, 2 * 3 * 13 * 13).view(2, 3, 13, 13)
MASKS = {
    "pairs": torch.ones(13, 13).tril() > 0,
    "keys of an image": torch.arange(26).view(2, 1, 1, 13) % 5 > 0,
    "no key": (torch.arange(13) > 4)[:, None],
    "bias": ROWS[0, 0],
    "of a head": ROWS[:1],
    "of all": ROWS,
    "of queries": ROWS[:, :1, :, :1],
    "float32 minimum": torch.zeros(2, 1, 13, 13).index_fill(
        3, torch.tensor([0, 5]), torch.finfo(torch.float32).min
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, dtype: torch.dtype, compiled: None, fused_calls) -> None:  # type: ignore[no-untyped-def]
    mask = MASKS[name]
    both = {torch.float64: mask, dtype: mask}
    if mask.is_floating_point() and mask.min() > -2:
        both = {kind: mask.to(dtype).to(kind) for kind in both}
    inputs = qkv(dtype)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kdfast.scaled_dot_product_attention(q, k, v, both[dtype])

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = both[q.dtype]
        return F.scaled_dot_product_attention(
            q, k, v, own if own.dtype == torch.bool else own.to(q)
        )

    got, theirs = run(ours, inputs), run(torchs, inputs)
    exact = run(torchs, [x.double() for x in inputs])
    for label, *triple in zip(("out", "dq", "dk", "dv"), got, exact, theirs, strict=True):
        assert_no_worse(f"{name} {label}", *triple)
    assert len(fused_calls) == 1
    if name == "no key":
        assert not got[0][:, :, :5].any()


def test_gradient_of_a_mask(compiled: None, fused_calls) -> None:  # type: ignore[no-untyped-def]
    for mask in (ROWS[0, :1], ROWS[:, :1, :1], ROWS):
        inputs = [*(x.double() for x in qkv()), mask.double()]
        got = run(kdfast.scaled_dot_product_attention, inputs)
        want = run(F.scaled_dot_product_attention, inputs)
        assert got[4].shape == mask.shape
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert len(fused_calls) == 3


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 13, 13), torch.float64), ((5, 13), torch.float32)], ids=str
)
def test_masks_that_are_not_fused(shape, dtype, fused_calls) -> None:  # type: ignore[no-untyped-def]
    call, mask = kdfast.scaled_dot_product_attention, torch.zeros(shape, dtype=dtype)
    with pytest.raises(NotImplementedError, match="the kernels take no mask of this kind"):
        call(*qkv(), mask, backend="fused")
    with pytest.raises(RuntimeError):  # torch's own
        call(*qkv(), mask)
    assert not fused_calls


def test_shapes_that_the_kernels_lack(fused_calls) -> None:  # type: ignore[no-untyped-def]
    q, k, v = qkv()
    few = q[:, :, :2]
    call = kdfast.scaled_dot_product_attention
    assert torch.equal(call(few, k, v), F.scaled_dot_product_attention(few, k, v))
    assert torch.equal(call(q[0], k[0], v[0]), F.scaled_dot_product_attention(q[0], k[0], v[0]))
    grouped = call(q, k[:, :1], v[:, :1], enable_gqa=True)
    want = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
    assert torch.equal(grouped, want) and not fused_calls
    with pytest.raises(NotImplementedError, match=r"one shape, got \(2, 3, 2, 16\)"):
        call(few, k, v, backend="fused")
    with pytest.raises(NotImplementedError, match="take 4 dimensions, D >= 1, got 3"):
        call(q[0], k[0], v[0], backend="fused")


def test_backends(fused_calls) -> None:  # type: ignore[no-untyped-def]
    inputs = qkv()
    want = F.scaled_dot_product_attention(*inputs)
    out = kdfast.scaled_dot_product_attention(*inputs, backend="reference")
    torch.testing.assert_close(out, want)
    assert fused_calls[0]["backend"] == "reference"
    with pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"):
        kdfast.scaled_dot_product_attention(*inputs, backend="cuda")


def test_where_there_is_no_kernel_torchs_function_runs(monkeypatch, fused_calls) -> None:  # type: ignore[no-untyped-def]
    inputs = qkv()
    want = F.scaled_dot_product_attention(*inputs)
    monkeypatch.setattr(sdpa, "why_not", lambda q: "no kernel here")
    assert torch.equal(kdfast.scaled_dot_product_attention(*inputs), want)
    assert not fused_calls
    tables = torch.randn(13, 16), torch.randn(13, 16)
    rotated = sdpa.self_attention(*inputs, rope=kdfast.Rope(*tables))
    reference = kdfast.pruned_attention(*inputs, rope=kdfast.Rope(*tables), backend="reference")
    torch.testing.assert_close(rotated, reference)
