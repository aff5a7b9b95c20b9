# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/internals/numerics.md: each is measured here and must stand there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.ops._library import EXTENSION
from kdfast.testing import AttentionCase, run

DOC = Path(__file__).resolve().parents[1] / "docs" / "internals" / "numerics.md"
ISAS = EXTENSION.testable_isas() if EXTENSION else []
TILES = [isa for isa in ISAS if isa in ("amx", "amx_emulated")]
BF16 = [isa for isa in ISAS if isa == "avx512_bf16"] + TILES
SHAPE = (1, 3, 197, 64)
NORMAL = (3.6e-7, 4.1e-7, 4.6e-7, 4.2e-7)
MEDIUM = (3.2e-3, 4.2e-3, 4.1e-3, 3.2e-3)
HIGH = (6.0e-6, 7.9e-6, 7.9e-6, 6.3e-6)
HALF = (2.1e-4, 3.0e-4, 3.0e-4, 2.8e-4)
NEAR = 0.05


def row(name: str) -> str:
    """The line of the table about ``name``."""
    (line,) = (x for x in DOC.read_text("utf-8").splitlines() if x.startswith(f"| {name} |"))
    return line


def errors(call: Any, inputs: list[Tensor], backend: str = "fused") -> list[float]:
    """rel-L2 of results and gradients, against the reference in fp64 on the same numbers."""
    exact = run(call("reference"), [x.double() for x in inputs])
    pairs = zip(run(call(backend), inputs), exact, strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def listed(figures: tuple[float, ...]) -> str:
    return ", ".join(f"{x:.1e}".replace("e-0", "e-") for x in figures)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    ("isa", "setting", "dtype", "want"),
    [
        *((isa, "highest", torch.float32, NORMAL) for isa in ISAS),
        *((isa, "medium", torch.float32, MEDIUM) for isa in BF16),
        *((isa, "high", torch.float32, HIGH) for isa in TILES),
        *((isa, "highest", torch.float16, HALF) for isa in ISAS),
    ],
)
def test_pruned_attention(
    isa: str, setting: str, dtype: torch.dtype, want: tuple[float, ...]
) -> None:
    case = AttentionCase(SHAPE)
    EXTENSION.set_cpu_isa(isa)
    torch.set_float32_matmul_precision(setting)
    assert errors(case.call, case.inputs(dtype)) == pytest.approx(want, rel=NEAR)
    half = dtype == torch.float16
    name = "pruned_attention on AMX, fp16" if half else "pruned_attention on the CPU, fp32"
    assert listed(want) in row(name)


@pytest.mark.usefixtures("compiled")
def test_swiglu_norm() -> None:
    gate, value = torch.randn(2, 1600, 2730).bfloat16()
    weight, bias = torch.randn(2, 2730).bfloat16()

    def call(backend: str) -> Any:
        return lambda *x: kdfast.swiglu_norm(*x, backend=backend)

    *_, dweight, dbias = errors(call, [gate, value, weight, bias], "fused")
    *_, low_dweight, low_dbias = errors(call, [gate, value, weight, bias], "reference")
    assert (dweight, dbias) == pytest.approx((2.3e-3, 2.3e-3), rel=NEAR)
    assert (low_dweight, low_dbias) == pytest.approx((4.2e-2, 4.6e-2), rel=NEAR)
    assert "by weight and bias is 4.2e-2, 4.6e-2 (2.3e-3, 2.3e-3 here)" in row("swiglu_norm")
