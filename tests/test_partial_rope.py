# SPDX-License-Identifier: Apache-2.0
"""Tables of fewer columns than a head has channels: the first channels are rotated."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast import Rope, Window
from kdfast.ops.attention_entropy import attention_entropy
from kdfast.ops.geometry import LAYOUTS
from kdfast.ops.pruned_attention import rotated
from kdfast.testing import run


def tables(rows: int, width: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(rows)[:, None] * (0.3 + torch.arange(width) / 7)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_is_a_rotation_of_the_first_channels(layout: str) -> None:
    x = torch.randn(2, 3, 5, 16)
    for width in (2, 6, 16):
        rope = Rope(*tables(4, width), 1, layout)
        first = rotated(x[..., :width], rope, None)
        assert torch.equal(rotated(x, rope, None), torch.cat((first, x[..., width:]), -1))


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [2, 8, 14])
def test_kernels(width: int, layout: str, windowed: bool, isa: str) -> None:
    window = Window((3, 4), 3, torch.randn(2, 16, dtype=torch.float64)) if windowed else None
    rope = Rope(*tables(9 if windowed else 12, width), 0, layout)
    teacher_rope = Rope(*tables(9 if windowed else 12, 4), 0, layout)
    inputs = [torch.randn(1, 2, 12, 16, dtype=torch.float64) for _ in range(3)]
    teacher = [torch.randn(1, 2, 12, 10, dtype=torch.float64) for _ in range(2)]
    found = []
    for backend in ("fused", "reference"):
        options: Any = {"rope": rope, "window": window, "backend": backend}

        def calls(q: Tensor, k: Tensor, v: Tensor, options: Any = options) -> tuple[Tensor, ...]:
            out = kdfast.pruned_attention(q, k, v, heads=[1], **options)
            both = kdfast.attention_distill(q, k, v, *teacher, teacher_rope=teacher_rope, **options)
            return out, *both

        found.append([*run(calls, inputs), *attention_entropy(*inputs[:2], **options)])
    for fused, eager in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("width", [0, 3, 18])
def test_rejects(width: int) -> None:
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"must be \(4, 16\), or of fewer channels, an even numb"):
        kdfast.pruned_attention(q, q, q, rope=Rope(*tables(4, width)))
