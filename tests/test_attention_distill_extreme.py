# SPDX-License-Identifier: Apache-2.0
"""attention_distill of logits so large that fp32 has no digit left behind their point."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Window
from kdfast.ops import attention_distill as op
from kdfast.ops.attention_entropy import attention_entropy
from kdfast.testing import run

pytestmark = pytest.mark.skipif(
    "cpu" not in op.FUSED_ON, reason="attention_distill has no compiled CPU kernel in this build"
)
KINDS = tuple(op.STATS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grid(shape: tuple[int, ...], unit: float, seed: int) -> Tensor:
    """Multiples of ``unit`` up to 64 of them: every dtype holds them, and fp32 all their scores."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 65, shape, generator=generator) * unit


def sides(near: slice | None = None) -> list[Tensor]:
    """q, k of the student and of the teacher; scores some 2^14 times 2^18, the ``near`` ones 2^-8.

    No query has two largest scores: there alone would the maps be the fruit of rounding.
    """
    tensors = [grid((1, 2, 40, 16), 512.0, seed) for seed in range(4)]
    for q, k in (tensors[:2], tensors[2:]):
        if near is not None:
            q[:, :, near] *= 2.0**-26
        two = (q.double() @ k.double().mT).topk(2).values
        assert (two[..., 0] > two[..., 1]).all()
        assert two[..., 0].amax() > 4e9
    return tensors


def results(
    x: list[Tensor], dtype: torch.dtype, backend: str, window: Window | None = None, **options: Any
) -> list[Tensor]:
    """out, loss, dq, dk, dv."""
    q, k, tq, tk = (t.to(dtype) for t in x)
    v = grid(q.shape, 0.125, 9).to(dtype)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return kdfast.attention_distill(
            *(q, k, v, tq, tk), window=window, backend=backend, **{"scale": 1.0, **options}
        )

    return run(call, [q, k, v])


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for name, a, b in zip("out loss dq dk dv".split(), got, want, strict=True):
        b = b.to(a.dtype).double()  # fp16 has no number for some gradients of logit_mse
        # Of one key in the place of another, q and k of 2^15 make some 2^15 / 80 of a gradient.
        eps = max(torch.finfo(a.dtype).eps, 2.0**-18)
        largest = b.nan_to_num(posinf=0, neginf=0).abs().max().item()
        bound = {"out": 0, "loss": 0}.get(name, 2**15 * eps) + 4 * eps * largest
        torch.testing.assert_close(
            a.double(), b, rtol=4 * eps, atol=bound, msg=partial("{}: {}".format, name)
        )


def compare(x: list[Tensor], dtype: torch.dtype, kind: str, **options: Any) -> None:
    got = results(x, dtype, "fused", kind=kind, **options)
    want = results(x, torch.float64, "reference", kind=kind, **options)
    close(got, want)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, dtype: torch.dtype) -> None:
    for temperature in (1.0, 2.5, 1 / 64):
        compare(sides(), dtype, kind, temperature=temperature)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
def test_signs_scales_and_a_temperature_that_smooths(kind: str) -> None:
    for options in (
        {"scale": -1.0, "teacher_scale": 1.0},
        {"scale": 0.3, "teacher_scale": -0.7, "temperature": 2.0},
        {"temperature": 1e9},
    ):
        compare(sides(), torch.float32, kind, **options)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "reverse_kl"])
def test_large_rows_beside_small_ones(kind: str) -> None:
    """Not reverse_kl: the gradient of its small rows by large teacher scores is all rounding."""
    x = sides(near=slice(0, None, 3))
    for temperature in (1.0, 2.5):
        compare(x, torch.float32, kind, temperature=temperature)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
def test_padded_keys(kind: str) -> None:
    """Logits of 0 beside those of both signs: rows without a positive one have all their weight."""
    x = sides()
    x[1][:, :, 20:] = x[1][:, :, 20:].abs()
    x[0][:, :, 30:] = -x[0][:, :, 30:].abs()
    value = grid((2, 16), 0.125, 5)
    for temperature in (1.0, 2.5):
        got, want = (
            results(
                *(x, dtype, backend, Window((5, 8), 4, value.to(dtype))),
                kind=kind,
                temperature=temperature,
            )
            for dtype, backend in ((torch.float32, "fused"), (torch.float64, "reference"))
        )
        close(got, want)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy(dtype: torch.dtype) -> None:
    q, k = (t.to(dtype) for t in sides()[:2])
    k[:, :, 7] = k[:, :, 3]
    got = attention_entropy(q, k, scale=1.0)[0]
    scores = q.double() @ k.double().mT
    two = scores.argmax(-1) == 3
    want = torch.where(two, torch.tensor(2.0).log(), 0.0)
    assert two.any() and not two.all()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
