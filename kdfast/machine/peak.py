# SPDX-License-Identifier: Apache-2.0
"""The rate of multiply-adds that this CPU can reach, and what torch's libraries reach of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops import _torch_private as private
from kdfast.ops._library import EXTENSION

ROUNDS, SECONDS = 3, 0.02
# Rows, inputs and outputs of linear layers: MLPs of ViT-S at batch 8 and of ViT-B at batch 4, and
# the first of ViT-S at batch 1.
SHAPES = ((1576, 384, 1536), (788, 3072, 768), (197, 384, 1536))
# A library's rate is the best of the calls within this time, after one that warms up.
LIBRARY_SECONDS = 0.025


def peak_flops(dtype: torch.dtype, threads: int | None = None) -> float:
    """Rate that no product of this dtype can exceed on this CPU.

    It is measured, not computed from a data sheet: loops of independent multiply-adds on registers,
    without a load or a store (csrc/cpu/isa/peak_vectors.h, peak_amx.cpp), run on all threads at
    once, the best of ROUNDS times SECONDS with each kind of instruction. fp32 has vector
    multiply-adds of 256 and 512 bits; bf16 has these too, as a kernel may convert, and where the
    CPU has them dot products of bf16 (AVX512_BF16) or tiles (AMX). ``KDFAST_CPU_ISA`` does not
    matter: the limit is the machine's, at the clock that it has under such a load.

    Time is the CPU time of each thread. So other processes on the cores do not lower the limit, as
    they do lower what a library reaches meanwhile.

    Args:
        dtype: float32 or bfloat16.
        threads: How many run the loop; None: as many as torch uses.

    Returns:
        Floating-point operations a second of all threads together, two a multiply-add; of more
        threads than the process has CPUs, those of the CPUs.

    Raises:
        RuntimeError: The extension is not built.
        ValueError: Another dtype, or fewer than one thread.
    """
    if EXTENSION is None:
        raise RuntimeError("peak_flops: needs the compiled extension kdfast._C, got none")
    if threads is not None and threads < 1:
        raise ValueError(f"peak_flops: threads must be at least 1, got {threads}")
    isas = EXTENSION.available_isas()
    loops = [(isa, False) for isa in isas if isa in ("avx2", "avx512")] or [(isas[0], False)]
    if _is_bf16("peak_flops", dtype) and isas[-1] in ("avx512_bf16", "amx"):
        loops.append((isas[-1], True))
    with _threads(threads):
        best: float = max(EXTENSION.run_peak(*loop, SECONDS)[1] for loop in loops * ROUNDS)
        return best * min(1, len(os.sched_getaffinity(0)) / torch.get_num_threads())


def library_flops(dtype: torch.dtype) -> float:
    """The best of ``library_rates``: what can be had without writing a kernel.

    Args:
        dtype: float32 or bfloat16.

    Raises:
        ValueError: Another dtype.
    """
    return max(library_rates(dtype).values())


def library_rates(dtype: torch.dtype) -> dict[str, float]:
    """Rates of the matrix products in torch, on its threads: the best of a few layers of ViTs.

    Args:
        dtype: float32 or bfloat16.

    Returns:
        "torch" is ``F.linear``, which calls MKL or oneDNN. "oneDNN" is that library on a weight
        laid out for it beforehand; absent where torch has none or it cannot run the dtype.

    Raises:
        ValueError: Another dtype.
    """
    bf16 = _is_bf16("library_rates", dtype)
    rates: dict[str, float] = {}
    with torch.inference_mode():
        for rows, inputs, outputs in SHAPES:
            x, weight = (torch.ones(n, inputs).to(dtype) for n in (rows, outputs))
            calls: dict[str, Callable[[], Tensor]] = {"torch": partial(F.linear, x, weight)}
            if _has_onednn(bf16):
                calls["oneDNN"] = _onednn_linear(x, weight)
            for name, call in calls.items():
                rate = 2 * rows * inputs * outputs / _best_seconds(call)
                rates[name] = max(rate, rates.get(name, 0.0))
    return rates


def _is_bf16(function: str, dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{function}: dtype must be float32 or bfloat16, got {dtype}")
    return dtype == torch.bfloat16


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Context in which torch uses ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _has_onednn(bf16: bool) -> bool:
    if not torch.backends.mkldnn.is_available() or private.linear_pointwise is None:
        return False
    return not bf16 or bool(private.multiplies_bf16())


def _onednn_linear(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    packed = private.reorder_linear_weight(weight, len(x))
    return partial(private.linear_pointwise, x, packed, None, "none", [], "")


def _best_seconds(call: Callable[[], Tensor]) -> float:
    call()
    best, started = float("inf"), time.perf_counter()
    while (begun := time.perf_counter()) - started < LIBRARY_SECONDS:
        call()
        best = min(best, time.perf_counter() - begun)
    return best
