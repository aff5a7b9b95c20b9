# SPDX-License-Identifier: Apache-2.0
"""The rule that says which library multiplies matrices of linear layers on the CPU.

torch ships two: MKL, or whatever BLAS it was built with, and oneDNN. See docs/ops/linear.md.
"""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops import _torch_private as private
from kdfast.ops._processor import Processor, processor
from kdfast.ops._watch import traced, transformed

SETTINGS = ("auto", "onednn", "torch")
# Multiply-adds from which on oneDNN's product pays for the longer time that it takes to be called.
LEAST_WORK = 1 << 20
# Those of AMD where MKL reaches half of the core's rate in fp32 (it takes its AVX2 path), so that
# oneDNN wins every product.
_WIDE = ("Zen 5",)


def _setting() -> str:
    setting = os.environ.get("KDFAST_LINEAR", "auto")
    if setting not in SETTINGS:
        raise ValueError(f"KDFAST_LINEAR: must be one of {SETTINGS}, got {setting!r}")
    if setting == "onednn" and not _available():
        raise ValueError("KDFAST_LINEAR: must not be 'onednn' here, this torch has no oneDNN")
    return setting


def _available() -> bool:
    """Whether this torch has oneDNN and the operators that reach it."""
    operators = private.linear_pointwise, private.reorder_linear_weight
    return torch.backends.mkldnn.is_available() and None not in operators


class Choice(NamedTuple):
    """Which products of a linear layer oneDNN computes; the others are left to torch.

    Attributes:
        forward: The layer itself, on a weight as it is.
        packed: The layer in inference, on a copy of its weight in oneDNN's own layout.
        input_gradient: The gradient of the input.
        weight_gradient: That of the weight if it has no more rows than columns.
        tall_gradient: That of the weight if it has more rows than columns.
        reason: Why, in words.
    """

    forward: bool
    packed: bool
    input_gradient: bool
    weight_gradient: bool
    tall_gradient: bool
    reason: str


def rule(dtype: torch.dtype, machine: Processor, setting: str, supported: bool) -> Choice:
    """The choice for a dtype on a processor, by what was measured: never by a timing at start.

    Args:
        dtype: That of input and weight.
        machine: The processor.
        setting: "auto", "onednn" or "torch", as in KDFAST_LINEAR.
        supported: Whether oneDNN multiplies this dtype here.
    """

    def all_or_none(onednn: bool, reason: str) -> Choice:
        return Choice(onednn, onednn, onednn, onednn, onednn, reason)

    if not supported:
        return all_or_none(False, f"oneDNN has no fast {str(dtype)[6:]} product here")
    if setting != "auto":
        return all_or_none(setting == "onednn", f"KDFAST_LINEAR={setting}")
    if dtype != torch.float32:
        why = "torch uses oneDNN itself; in inference weights are packed"
        return Choice(False, True, False, False, False, why)
    if machine.name in _WIDE:
        return all_or_none(True, f"MKL reaches half of oneDNN's rate on {machine.name}")
    if machine.vendor == "AuthenticAMD":
        why = f"oneDNN is ahead of MKL on {machine.name}, except in tall weight gradients"
        return Choice(True, True, True, True, False, why)
    why = f"MKL is near the peak of {machine.name}; in inference oneDNN adds without a pass more"
    return Choice(False, True, False, False, False, why)


def _supported() -> frozenset[torch.dtype]:
    """The dtypes that oneDNN multiplies at full speed on this processor."""
    if not _available():
        return frozenset()
    half = {
        torch.bfloat16: private.multiplies_bf16(),
        torch.float16: private.multiplies_fp16(),
    }
    return frozenset({torch.float32} | {dtype for dtype, fast in half.items() if fast})


# Read once: torch.compile(fullgraph=True) could not trace how they come about.
SETTING = _setting()
SUPPORTED = _supported()
CHOICES = {
    dtype: rule(dtype, processor(), SETTING, dtype in SUPPORTED)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
_LEFT = Choice(False, False, False, False, False, "torch's own settings ask for its products")


def choice(dtype: torch.dtype) -> Choice:
    """The choice for a dtype here and now.

    ``torch.backends.mkldnn`` turned off and ``torch.set_float32_matmul_precision`` below "highest"
    keep their meaning: torch multiplies then.
    """
    enabled, products = _settings_of_torch()
    if dtype not in CHOICES or not enabled or (products and dtype == torch.float32):
        return _LEFT
    return CHOICES[dtype]


# What torch calls what products of fp32 may be made of, and what the kernels do.
_PRODUCTS = {"none": 0, "ieee": 0, "tf32": 1, "bf16": 2}


@torch.compiler.assume_constant_result  # a compiled graph keeps what held when it was compiled
def _settings_of_torch() -> tuple[bool, int]:
    """Whether oneDNN is enabled, and what its products of fp32 may be made of: see products_of."""
    # torch.get_float32_matmul_precision raises once torch.backends.*.fp32_precision was set.
    onednn: Any = torch.backends.mkldnn
    return onednn.enabled, _PRODUCTS[onednn.matmul.fp32_precision]


def products_of(x: Tensor) -> int:
    """What the CPU kernels may make products of x's type of, an argument of attention ops.

    0: numbers of that type; 1: two bf16 for each, which lose none of an fp32's first 16 bits; 2:
    one bf16. fp32 follows the setting that torch's own product reads, which
    ``torch.set_float32_matmul_precision`` sets too; other types have no choice.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return 0
    enabled, products = _settings_of_torch()
    return products if enabled else 0


def seen_by_torch() -> bool:
    """Whether something looks at each operator that runs, and must see torch's own.

    Exporters, tracers, torch.func, forward-mode derivatives, and dispatch modes (counters of FLOPs,
    fake tensors).
    """
    if transformed() or traced():
        return True
    return not torch.compiler.is_compiling() and private.dispatch_modes() > 0


def is_batched(x: Tensor) -> bool:
    """Whether vmap gave a tensor, as it does where gradients of several outputs are asked for."""
    if torch.compiler.is_compiling():
        return False
    return private.is_batched(x) or private.is_legacy_batched(x)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary floating-point tensors of the CPU, no subclass, nothing sparse."""
    return all(x is None or (is_ordinary(x) and x.is_floating_point()) for x in tensors)


def is_ordinary(x: Tensor) -> bool:
    """Whether a tensor is one of the CPU, no subclass, nothing sparse."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not x.is_nested
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.t() + bias`` by oneDNN; ``weight`` may be packed."""
    out: Tensor = private.linear_pointwise.default(x, weight, bias, "none", [], "")
    return out
