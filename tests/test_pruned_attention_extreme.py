# SPDX-License-Identifier: Apache-2.0
"""pruned_attention of logits so large that a row has one key that counts."""

from functools import partial

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Window
from kdfast.ops import pruned_attention as op
from kdfast.testing import run

pytestmark = pytest.mark.skipif(
    "cpu" not in op.FUSED_ON, reason="pruned_attention has no compiled CPU kernel in this build"
)


def grid(shape: tuple[int, ...], unit: float, seed: int) -> Tensor:
    """Multiples of ``unit`` up to 64 of them: every dtype holds them, and fp32 all their scores."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 65, shape, generator=generator) * unit


def close(x: list[Tensor], dtype: torch.dtype, scale: float, pads: bool = False) -> None:
    def call(backend: str, *x: Tensor) -> Tensor:
        window = Window((5, 8), 4, x[3]) if pads else None
        return kdfast.pruned_attention(*x[:3], window=window, scale=scale, backend=backend)

    got = run(partial(call, "fused"), [t.to(dtype) for t in x])
    want = run(partial(call, "reference"), [t.double() for t in x])
    for name, a, b in zip("out dq dk dv dpad".split(), got, want, strict=False):
        b = b.to(dtype).double()  # fp16 has no number for some gradients
        eps = max(torch.finfo(dtype).eps, 2.0**-18)
        # P of 1e-3 in a wrong place would make a gradient of some 1e-3 * 64 times q or k.
        bound = eps * max(t.abs().max().item() for t in x) if name in ("dq", "dk") else 4 * eps
        torch.testing.assert_close(
            a.double(), b, rtol=4 * eps, atol=bound, msg=partial("{}: {}".format, name)
        )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", [4.0, 32.0, 512.0])  # logits of 2.5e4 to 5e9
def test_one_key_counts(unit: float, dtype: torch.dtype) -> None:
    q, k, v = (
        grid((1, 2, 40, 16), unit, 0),
        grid((1, 2, 40, 16), unit, 1),
        grid((1, 2, 40, 16), 1, 2),
    )
    two = (q @ k.mT).topk(2).values
    assert (two[..., 0] - two[..., 1]).min() > 128 and two.max() > 1000 * unit**2
    for scale in (1.0, -1.0, 0.3):
        close([q, k, v / 64], dtype, scale)
    # Beside rows of ordinary logits, in the same vectors.
    q[:, :, ::3] *= 2.0**-26
    close([q, k, v / 64], dtype, 1.0)


@pytest.mark.usefixtures("isa")
def test_padded_keys() -> None:
    """Logits of 0 beside those of both signs: rows without a positive one have all their weight."""
    q, k, v = (grid((1, 2, 40, 16), unit, seed) for seed, unit in enumerate((512.0, 512.0, 1 / 64)))
    q[:, :, 30:], k[:, :, 20:] = -q[:, :, 30:].abs(), k[:, :, 20:].abs()
    close([q, k, v, grid((2, 16), 1 / 64, 5)], torch.float32, 1.0, pads=True)
