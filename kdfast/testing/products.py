# SPDX-License-Identifier: Apache-2.0
"""Matrix products of fp32 made of bf16 ones, a yardstick for kernels that do the same."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Bf16Product(torch.autograd.Function):
    """a @ b and its gradients by products of bf16 summed in fp32."""

    @staticmethod
    def multiply(a: Tensor, b: Tensor, terms: int) -> Tensor:
        left, right = _bf16_parts(a, terms), _bf16_parts(b, terms)
        pairs = [(i, j) for i in range(terms) for j in range(terms - i)]
        return torch.stack([left[i] @ right[j] for i, j in pairs]).sum(0)

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, terms: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.terms = terms
        return _Bf16Product.multiply(a, b, terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        da = _Bf16Product.multiply(grad, b.mT, ctx.terms)
        return da, _Bf16Product.multiply(a.mT, grad, ctx.terms), None


def _bf16_parts(x: Tensor, terms: int) -> list[Tensor]:
    """bf16 numbers that sum up to about x, the largest first."""
    parts = []
    for _ in range(terms):
        parts.append(x.bfloat16().float())
        x = x - parts[-1]
    return parts


class Bf16Products(TorchFunctionMode):
    """Inside it, matrix products of fp32 are made of ``terms`` bf16 for every value.

    What torch's CPU products may do under ``set_float32_matmul_precision("medium")``, on any CPU:
    the yardstick for kernels that do it.
    """

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.terms = terms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return _Bf16Product.apply(*args, self.terms)
        return func(*args, **(kwargs or {}))
