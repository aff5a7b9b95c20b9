# SPDX-License-Identifier: Apache-2.0
"""Checks and times attention with other block sizes: a process of ``python -m bench.gpu --tune``.

A question names a call of bench/gpu_tune_cases.py, an entry of the table and blocks for it. With
"check" the answer is whether the results are right; the kernels are then in Triton's cache on disk,
from where a process that times finds them. With "time" it is microseconds of every sample of each
of the blocks, taken in turns.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import triton
from torch import Tensor

import kdfast
from bench import gpu_rivals
from bench.gpu_limits import Shape
from bench.gpu_probes import DEVICE, Attention
from bench.gpu_tune_cases import Setup, setups
from bench.gpu_worker import questions
from kdfast import Rope, Window
from kdfast.kernels import _blocks, _common
from kdfast.testing import DRY_RUN, assert_no_worse, launch_on_cpu, rotary, run

SAMPLES = 1 if DRY_RUN else 40
# Bytes that push everything out of the L2 cache.
FLUSH = 256 << 20
Call = Callable[[], Any]


def set_blocks(key: _blocks.Key, value: Any) -> None:
    """From now on launches take these blocks for an entry of the table."""
    table = _blocks.table(_blocks.architecture(DEVICE))
    table.blocks[key] = _blocks.blocks_of(_blocks.name_of(key), value)
    _common.choose_tiles.cache_clear()


@functools.lru_cache(maxsize=2)
def expected(place: int, direction: str) -> tuple[Callable[..., Any], list[Tensor], Any, Any]:
    """A call by its backend, its inputs, and what it has to give: exactly, and by eager code."""
    setup = setups()[place]
    s, dtype = setup.shape, getattr(torch, setup.dtype)
    torch.manual_seed(place)

    def packed() -> Tensor:
        shape = (setup.images, s.tokens, 3, s.heads, s.dim)
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    inputs, teacher = [packed()], packed()
    if s.grid is not None:
        inputs.append(torch.randn(s.heads, s.dim, device=DEVICE, dtype=dtype))
    if setup.biases:
        shape = (setup.biases, s.heads, s.tokens, s.tokens)
        inputs.append(torch.randn(shape, device=DEVICE, dtype=dtype))
    rope = None
    if setup.rope:
        tables = rotary(s.size**2 or s.tokens, s.dim)
        rope = Rope(tables.cos.to(DEVICE), tables.sin.to(DEVICE))

    def call(backend: str, packed: Tensor, extra: Tensor | None = None) -> Any:
        # Views of one projection, as in what is timed.
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
        window = None if s.grid is None else Window(s.grid, s.size, extra)
        if setup.kind == "maps":
            goal_q, goal_k, _ = teacher.to(q).permute(2, 0, 3, 1, 4).unbind()
            out, loss = kdfast.attention_distill(
                q, k, v, goal_q, goal_k, rope=rope, teacher_rope=rope, backend=backend
            )
            return out, 100 * loss
        bias = extra if setup.biases else None
        return kdfast.pruned_attention(
            q, k, v, rope=rope, window=window, bias=bias, backend=backend
        )

    function = functools.partial(results, direction, call)
    exact = function("reference", [x.double() for x in inputs])
    return function, inputs, exact, function("reference", inputs)


def results(
    direction: str, call: Callable[..., Any], backend: str, inputs: list[Tensor]
) -> list[Tensor]:
    """What a call gives: forward its results, backward its gradients with them."""
    if direction == "backward":
        return run(functools.partial(call, backend), inputs)
    with torch.no_grad():
        found = call(backend, *inputs)
    return list(found) if isinstance(found, tuple) else [found]


def check(place: int, direction: str) -> None:
    """Raises AssertionError unless the kernels give what the reference gives."""
    function, inputs, exact, eager = expected(place, direction)
    # Three TF32 products in place of one of fp32 drop what is below 2^-21 of a product.
    eps = 2.0**-21 if setups()[place].itemsize == 4 and not DRY_RUN else None
    for i, triple in enumerate(zip(function("fused", inputs), exact, eager, strict=True)):
        # The error of a single number may be 0 by luck.
        limit = 2.0**-17 if triple[0].numel() == 1 else eps
        assert_no_worse(f"result {i}", *triple, eps=limit)


def launches(setup: Setup, direction: str) -> Call:
    """The launches of one pass of a call, as the op makes them."""
    case = Attention(setup.shape, setup.rope, getattr(torch, setup.dtype), setup.biases)
    if setup.kind == "maps":
        if direction == "forward":
            return case.distill
        out, _, stats = case.distill()
        return lambda: case.distill_backward(out, stats)
    if direction == "forward":
        return case.forward
    saved = case.forward()
    return lambda: case.backward(*saved)


class Timer:
    """Samples a call: replays of a CUDA graph with a cold L2 cache."""

    def __init__(self, call: Call) -> None:
        self.call = call
        call()
        if not DRY_RUN:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.kept = call()

    def sample(self) -> float:
        """Microseconds."""
        if DRY_RUN:
            start = time.perf_counter()
            self.call()
            return 1e6 * (time.perf_counter() - start)
        flush().zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * begin.elapsed_time(end)


@functools.cache
def flush() -> Tensor:
    return torch.empty(FLUSH, dtype=torch.uint8, device=DEVICE)


def in_turns(timers: Sequence[Timer]) -> list[list[float]]:
    """Samples of each, so that a drift of the clock is the same for all."""
    samples: list[list[float]] = [[] for _ in timers]
    for turn in range(SAMPLES):
        for i in range(len(timers)):
            # Not the same one first each time.
            place = (i + turn) % len(timers)
            samples[place].append(timers[place].sample())
    return samples


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(samples) < 2:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return round(middle, 2), round(high - low, 2)


def timed(place: int, direction: str, key: _blocks.Key, variants: Sequence[Any]) -> Any:
    """Median and spread of every variant of an entry's blocks, in microseconds; None if it fails.

    All images need other launches than those that were checked: one may not fit.
    """
    timers: dict[int, Timer] = {}
    with torch.no_grad():
        call = launches(setups()[place], direction)
        for i, value in enumerate(variants):
            set_blocks(key, value)
            with suppress(triton.runtime.errors.OutOfResources):
                timers[i] = Timer(call)
        found = dict(zip(timers, in_turns(list(timers.values())), strict=True))
    return [summary(found[i]) if i in found else None for i in range(len(variants))]


def against_flash(dtype: str, dim: int, tokens: int, matrices: int) -> dict[str, Any]:
    """kdfast and flash-attn, forward alone and with the gradients; median and spread of each."""
    heads = 16
    shape = Shape(matrices // heads, heads, tokens, dim)
    case = Attention(shape, False, getattr(torch, dtype))
    rival = gpu_rivals.module("flash_attn").flash_attn_func

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = rival(*rows, deterministic=True)
        return out.transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kdfast.pruned_attention(q, k, v, backend="fused")

    def both(call: Callable[..., Tensor]) -> Call:
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        return lambda: torch.autograd.grad(call(*leaves), leaves, case.grad)

    found: dict[str, Any] = {}
    with torch.no_grad():
        calls = [functools.partial(call, *case.inputs) for call in (ours, flash)]
        near(calls[1](), calls[0]())
        found["forward"] = [summary(x) for x in in_turns([Timer(call) for call in calls])]
    calls = [both(call) for call in (ours, flash)]
    for got, want in zip(calls[1](), calls[0](), strict=True):
        near(got, want)
    found["both"] = [summary(x) for x in in_turns([Timer(call) for call in calls])]
    return found


def near(got: Tensor, want: Tensor) -> None:
    """Raises AssertionError unless both have the same values, as far as bf16 goes."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    assert error < 2e-2, f"flash-attn: relative error {error:.1e}"


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """What the parent asks for."""
    if "flash" in question:
        return against_flash(*question["flash"])
    place, direction = question["setup"], question["direction"]
    key = _blocks.key_of(question["key"])
    if question["do"] == "check":
        set_blocks(key, question["blocks"])
        check(place, direction)
        return {"right": True}
    return {"us": timed(place, direction, key, question["variants"])}


def main() -> None:
    """Answers until the input ends."""
    registered = launch_on_cpu() if DRY_RUN else None
    for question, reply in questions():
        before = dict(_blocks.table(_blocks.architecture(DEVICE)).blocks)
        try:
            found = answer(question)
        except Exception as error:  # a compiler's, the device's, or a wrong result
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        _blocks.table(_blocks.architecture(DEVICE)).blocks.update(before)
        _common.choose_tiles.cache_clear()
        if not DRY_RUN:
            torch.cuda.empty_cache()  # the other processes are on the same device
        reply(found)
    del registered


if __name__ == "__main__":
    main()
