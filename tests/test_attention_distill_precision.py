# SPDX-License-Identifier: Apache-2.0
"""attention_distill of fp32 whose products torch may make in bf16, and of fp16 in tiles of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Window
from kdfast.ops._library import EXTENSION
from kdfast.testing import Bf16Products, assert_no_worse, rotary, run

ISAS = EXTENSION.testable_isas() if EXTENSION else []
BF16 = [isa for isa in ISAS if isa in ("avx512_bf16", "amx", "amx_emulated")]
TILES = [isa for isa in ISAS if isa in ("amx", "amx_emulated")]
pytestmark = [
    pytest.mark.usefixtures("precision"),
    pytest.mark.skipif(not BF16, reason="needs AVX512_BF16"),
]
KINDS = ("kl", "reverse_kl", "jsd", "mse", "cosine", "logit_mse")
NAMES = ("out", "loss", "dq", "dk", "dv")


def call(kind: str, window: bool, backend: str) -> Callable[..., Any]:
    def distill(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor) -> Any:
        rope = rotary(16, 24) if window else None
        return kdfast.attention_distill(
            *(q, k, v, tq, tk),
            heads=[2, 0],
            teacher_heads=[1, 3],
            kind=kind,
            temperature=2.0 if window else 1.0,
            rope=rope,
            teacher_rope=rope,
            window=Window((5, 7), 4) if window else None,
            backend=backend,
        )

    return distill


def inputs(tokens: int) -> list[Tensor]:
    qkv = [torch.randn(2, 3, tokens, 24) for _ in range(3)]
    return [*qkv, *(torch.randn(2, 4, tokens, 24) for _ in range(2))]


def fused(kind: str, window: bool, x: list[Tensor], isa: str, precision: str) -> list[Tensor]:
    EXTENSION.set_cpu_isa(isa)
    torch.set_float32_matmul_precision(precision)
    got = run(call(kind, window, "fused"), x)
    torch.set_float32_matmul_precision("highest")
    return got


def judged(
    kind: str, window: bool, isa: str, precision: str, terms: int, loss_eps: float
) -> list[tuple[Tensor, Tensor]]:
    """Results and gradients with the exact ones; no worse than eager with ``terms`` bf16 each."""
    x = inputs(35 if window else 197)
    got = fused(kind, window, x, isa, precision)
    exact = run(call(kind, window, "reference"), [y.double() for y in x])
    with Bf16Products(terms):
        eager = run(call(kind, window, "reference"), x)
    for label, *triple in zip(NAMES, got, exact, eager, strict=False):
        # What rounding leaves in a single number is luck, so the loss has an eps of its own.
        eps = loss_eps if label == "loss" else None
        assert_no_worse(f"{kind} {label} {isa}", *triple, eps=eps)
    return list(zip(got, exact, strict=True))


@pytest.mark.parametrize("isa", BF16)
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_medium_is_no_worse_than_eager(kind: str, window: bool, isa: str) -> None:
    out, exact = judged(kind, window, isa, "medium", 1, torch.finfo(torch.bfloat16).eps)[0]
    assert (out - exact).norm() > 5e-4 * exact.norm()


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_high_is_no_worse_than_eager(kind: str, window: bool, isa: str) -> None:
    for a, b in judged(kind, window, isa, "high", 2, 2.0**-16):
        assert (a.double() - b).norm() <= 2**-14 * b.norm()


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fp16_runs_in_tiles(kind: str, window: bool) -> None:
    x = [y.half() for y in inputs(35)]
    plain = fused(kind, window, x, "avx512", "highest")
    exact = run(call(kind, window, "reference"), [y.double() for y in x])
    for isa in TILES:
        got = fused(kind, window, x, isa, "highest")
        assert not all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
        eager = run(call(kind, window, "reference"), x)
        for label, *triple in zip(NAMES, got, exact, eager, strict=False):
            eps = 2.0**-16 if label == "loss" else None
            assert_no_worse(f"{kind} {label} {isa}", *triple, eps=eps)


@pytest.mark.parametrize("kind", KINDS)
def test_setting_is_obeyed(kind: str) -> None:
    x = inputs(37)
    plain = fused(kind, False, x, "avx512", "highest")

    def same(isa: str, precision: str) -> bool:
        got = fused(kind, False, x, isa, precision)
        return all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))

    assert same("avx512", "medium")
    for isa in BF16:
        assert same(isa, "highest")
        assert same(isa, "high") == (isa not in TILES)
        assert not same(isa, "medium")


@pytest.mark.parametrize("isa", BF16)
def test_equal_sides_have_no_loss(isa: str) -> None:
    q, k, v = (torch.randn(1, 2, 50, 24) for _ in range(3))
    EXTENSION.set_cpu_isa(isa)
    for precision in ("medium", "high"):
        torch.set_float32_matmul_precision(precision)
        for kind in ("kl", "mse", "logit_mse"):
            loss = kdfast.attention_distill(q, k, v, q, k, kind=kind, backend="fused")[1]
            assert abs(loss) < 1e-6
