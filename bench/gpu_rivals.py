# SPDX-License-Identifier: Apache-2.0
"""Other libraries on a GPU, by name, where they are installed and run.

Those of attention take q, k and v (B, H, N, D) and give the same. SDPA's backends are forced one by
one, since which of them it takes by itself depends on torch's version and the card.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import session

Attention = Callable[..., Tensor]
Rival = TypeVar("Rival")
SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
# The modules with flash-attn's function in its second, third (Hopper) and fourth version.
FLASH = {"flash-attn": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
NAMES = ("flex", *SDPA, *FLASH)
SLOW = "takes too long to compile for every shape"
LOW = (torch.float16, torch.bfloat16)


class NotHere(Exception):
    """There is no such rival here; the message says why."""


def usable(
    makers: Mapping[str, Callable[[], Rival]], trial: Callable[[Rival], object]
) -> tuple[dict[str, Rival], dict[str, str]]:
    """The rivals that can do a case, and the reason for each of the others.

    Args:
        makers: By name, what makes the rival or raises.
        trial: Does the case with a rival once; what it raises is the reason.
    """
    found: dict[str, Rival] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            call = make()
            trial(call)
        except Exception as error:  # whatever a library says
            text = str(error) if isinstance(error, NotHere) else repr(error)
            missing[name] = " ".join(text.split())[:200]
        else:
            found[name] = call
    return found, missing


def module(name: str) -> Any:
    """A module of a library that may not be installed."""
    try:
        here = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor is the package that it belongs to
        here = False
    if not here:
        raise NotHere("not installed")
    return importlib.import_module(name)


def attention(
    dtype: torch.dtype, trial: Callable[[Attention], object], compiled: bool
) -> tuple[dict[str, Attention], dict[str, str]]:
    """``usable`` of all rivals of attention, for q, k and v of a dtype.

    Args:
        dtype: Of q, k and v.
        trial: As in ``usable``.
        compiled: Whether there is time for one that has to be compiled.
    """
    return usable(makers(dtype, compiled), trial)


def makers(dtype: torch.dtype, compiled: bool) -> Mapping[str, Callable[[], Attention]]:
    """By name, what makes the rival or raises."""
    made: dict[str, Callable[[], Attention]] = {"flex": lambda: flex(dtype, compiled)}
    made |= {name: lambda backend=backend: forced(backend) for name, backend in SDPA.items()}
    made |= {name: lambda source=source: flash(source, dtype) for name, source in FLASH.items()}
    return made


def flex(dtype: torch.dtype, compiled: bool) -> Attention:
    """FlexAttention, compiled."""
    if not compiled:
        raise NotHere(SLOW)
    if dtype == torch.float32 and torch.cuda.is_available():
        raise NotHere("in fp32 it is for TF32")
    from torch.nn.attention.flex_attention import flex_attention

    return session.compiled(flex_attention)


def forced(backend: SDPBackend) -> Attention:
    """SDPA by one of its backends."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def flash(source: str, dtype: torch.dtype) -> Attention:
    """``flash_attn_func`` of a module."""
    function = module(source).flash_attn_func
    if dtype not in LOW:
        raise NotHere("has no fp32")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(x.transpose(1, 2) for x in (q, k, v)))
        # Some versions give the log-sum-exp, too.
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call
