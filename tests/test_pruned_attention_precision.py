# SPDX-License-Identifier: Apache-2.0
"""fp32 whose products torch may make in bf16, and fp16 in tiles of bf16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdfast.ops._library import EXTENSION
from kdfast.testing import AttentionCase as Case
from kdfast.testing import Bf16Products, assert_no_worse, run

ISAS = EXTENSION.testable_isas() if EXTENSION else []
BF16 = [isa for isa in ISAS if isa in ("avx512_bf16", "amx", "amx_emulated")]
TILES = [isa for isa in ISAS if isa in ("amx", "amx_emulated")]
pytestmark = [
    pytest.mark.usefixtures("precision"),
    pytest.mark.skipif(not BF16, reason="needs AVX512_BF16"),
]
MATMUL = torch.backends.mkldnn.matmul
NAMES = ("out", "dq", "dk", "dv", "dextra")


CASES = {
    "odd": Case((2, 3, 37, 24)),
    "vit": Case((1, 3, 197, 64), (2, 0), layout="interleaved", prefix=1),
    # Images enough that eager's own largest error is no matter of luck.
    "d80": Case((8, 2, 33, 80), layout="half"),
    "d72": Case((1, 2, 50, 72), layout="interleaved", scale=-0.3),
    "d7": Case((1, 2, 18, 7)),
    "d256": Case((1, 1, 40, 256), layout="interleaved"),
    # More than one chunk of queries, and of keys that dq is summed over.
    "long": Case((1, 1, 700, 32)),
    "windows": Case((2, 3, 35, 16), (2, 0), layout="interleaved", grid=(5, 7), size=4, padded=True),
    "bias": Case((4, 2, 37, 40), biases=2),
}


def fused(case: Case, isa: str, precision: str, dtype: torch.dtype) -> list[Tensor]:
    EXTENSION.set_cpu_isa(isa)
    torch.set_float32_matmul_precision(precision)
    got = run(case.call("fused"), case.inputs(dtype))
    torch.set_float32_matmul_precision("highest")
    return got


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def judge(
    name: str, got: list[Tensor], call: Callable[[str], Any], x: list[Tensor], n: int
) -> None:
    """``got`` against eager code with products of ``n`` bf16 for a value."""
    exact = run(call("reference"), [y.double() for y in x])
    with Bf16Products(n):
        eager = run(call("reference"), x)
    for label, *triple in zip(NAMES, got, exact, eager, strict=False):
        # bf16 products flush what is too small for a normal fp32; nobody needs that part.
        some = [y.where(y.abs() > 1e-30, 0) for y in triple]
        assert_no_worse(f"{name} {label}", *some)


@pytest.mark.parametrize("isa", BF16)
@pytest.mark.parametrize("name", CASES)
def test_medium_is_no_worse_than_eager(name: str, isa: str) -> None:
    case, dtype = CASES[name], torch.float32
    got = fused(case, isa, "medium", dtype)
    assert all(x.dtype == dtype for x in got)
    judge(f"{name} {isa}", got, case.call, case.inputs(dtype), 1)
    # It is what was asked for: more exact would be fp32.
    exact = run(case.call("reference"), case.inputs(torch.float64))
    error = (got[0].double() - exact[0]).norm() / exact[0].norm()
    assert 5e-4 < error < 5e-3


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("name", CASES)
def test_high_is_no_worse_than_eager(name: str, isa: str) -> None:
    case, dtype = CASES[name], torch.float32
    got = fused(case, isa, "high", dtype)
    judge(f"{name} {isa}", got, case.call, case.inputs(dtype), 2)
    exact = run(case.call("reference"), case.inputs(torch.float64))
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b).norm() <= 2**-16 * b.norm()


@pytest.mark.parametrize("level", [-1e4, 1e4])
@pytest.mark.parametrize("isa", BF16)
def test_extreme_logits(isa: str, level: float) -> None:
    q, k, v = Case((1, 2, 37, 16)).inputs(torch.float32)
    q[..., 0], k[..., 0] = 100, (torch.arange(37) * 0.1 + 10) * level / 1e3
    # Products of bf16 keep no digit below 1e4 / 256: of numbers that they hold, all are kept.
    q, k = q.bfloat16().float(), k.bfloat16().float()
    EXTENSION.set_cpu_isa(isa)
    call = Case((1, 2, 37, 16), scale=1.0).call
    torch.set_float32_matmul_precision("medium")
    got = run(call("fused"), [q, k, v])
    torch.set_float32_matmul_precision("highest")
    judge(f"{level} {isa}", got, call, [q, k, v], 1)


@pytest.mark.parametrize("isa", ISAS)
def test_other_calls_do_not_see_the_setting(isa: str) -> None:
    case = CASES["vit"]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        want = fused(case, isa, "highest", dtype)
        assert same(fused(case, isa, "high", dtype), want)
        assert same(fused(case, isa, "medium", dtype), want)
    plain = fused(case, isa, "highest", torch.float32)
    if isa in BF16:
        # Nothing that fp32 did before there was a choice has changed.
        assert same(plain, fused(case, "avx512", "highest", torch.float32))
    assert same(fused(case, isa, "medium", torch.float32), plain) == (isa not in BF16)
    assert same(fused(case, isa, "high", torch.float32), plain) == (isa not in TILES)


def test_fp16_runs_in_tiles() -> None:
    case = CASES["odd"]
    plain = fused(case, "avx512", "highest", torch.float16)
    for isa in TILES:
        assert not same(fused(case, isa, "highest", torch.float16), plain)
    assert same(fused(case, "avx512_bf16", "highest", torch.float16), plain)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_setting_is_that_of_torch_matmul() -> None:
    """Every way to allow bf16 in torch's products, and the two that forbid it."""
    case, isa = CASES["odd"], BF16[0]
    plain, low = (fused(case, isa, p, torch.float32) for p in ("highest", "medium"))
    assert not same(plain, low)
    MATMUL.fp32_precision = "none"

    def now() -> list[Tensor]:
        return run(case.call("fused"), case.inputs(torch.float32))

    for holder in (MATMUL, torch.backends.mkldnn, torch.backends):
        holder.fp32_precision = "bf16"
        assert same(now(), low)
        holder.fp32_precision = "none"
        assert same(now(), plain)
    torch.backends.fp32_precision = "bf16"
    MATMUL.fp32_precision = "ieee"
    assert same(now(), plain)
    MATMUL.fp32_precision = "none"
    assert same(now(), low)
    torch.backends.fp32_precision = "none"
    MATMUL.fp32_precision = "bf16"
    # What flags() puts back for all of mkldnn is what holds here, so that must be unset.
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
        assert same(now(), plain)
    assert same(now(), low)


def test_backward_reads_the_setting_when_it_runs() -> None:
    case = CASES["odd"]
    EXTENSION.set_cpu_isa(BF16[0])
    results = {}
    for first in ("highest", "medium"):
        for second in ("highest", "medium"):
            leaves = [x.requires_grad_() for x in case.inputs(torch.float32)]
            torch.set_float32_matmul_precision(first)
            out = case.call("fused")(*leaves)
            torch.set_float32_matmul_precision(second)
            results[first, second] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    exact = results["highest", "highest"]
    assert same(results["highest", "medium"][:1], exact[:1])
    for pair, got in results.items():
        for a, b in zip(got[1:], exact[1:], strict=True):
            assert torch.equal(a, b) == (pair == ("highest", "highest"))
            assert (a - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize("isa", BF16)
@pytest.mark.parametrize("name", ["long", "windows", "bias"])
def test_threads_change_no_bit(name: str, isa: str) -> None:
    for precision in ("high", "medium"):
        results = []
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            results.append(fused(CASES[name], isa, precision, torch.float32))
        assert same(results[0], results[1])
        assert same(results[0], results[2])


def test_compile() -> None:
    case = CASES["windows"]
    want = fused(case, BF16[0], "medium", torch.float32)
    torch.set_float32_matmul_precision("medium")
    step = torch.compile(case.call("fused"), fullgraph=True, backend="aot_eager")
    assert same(run(step, case.inputs(torch.float32)), want)
