# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings after ``accelerate``: convolutions without overlap, as products."""

import copy

import pytest
import torch
from torch import nn

import kdfast

pytestmark = pytest.mark.usefixtures("always_packed")


@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 32), (2, 3, 70, 37), (3, 64, 64), (0, 3, 64, 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_patches(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 256, (16, 16), (16, 16))).to(dtype)
    fused = copy.deepcopy(plain)
    assert len(kdfast.accelerate(fused).layers) == 1
    x = torch.randn(shape).to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    results = []
    for model in (plain, fused):
        out = model(x)
        grads = torch.autograd.grad(out.sin().sum(), list(model.parameters()))
        with torch.no_grad():
            results.append([out, *grads, model.eval()(x)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=50 * tolerance)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [(3, 10, 10), (2, 4, 32, 32)])
def test_wrong_pictures_raise_what_torch_raises(size: tuple[int, ...]) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 16, 16)).eval()
    fused = copy.deepcopy(plain)
    kdfast.accelerate(fused)
    for model in (plain, fused):
        with pytest.raises(RuntimeError, match="Kernel size can't be|expected input"):
            model(torch.randn(size))
