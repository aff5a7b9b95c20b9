# SPDX-License-Identifier: Apache-2.0
"""What `python -m bench.gpu` measures beside tests and benches: goals, determinism and memory.

A process of its own, so that a crash of the device costs these figures only:
``python -m bench.gpu_probes FILE UNTIL`` writes them as JSON; UNTIL is a Unix time.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_limits import EVA, GLOBAL, GOALS, ORION, Shape
from bench.session import copy_seconds, sized
from kdfast import linear_kd_loss
from kdfast.machine.memory import peak_bytes
from kdfast.ops._matmul import products_of
from kdfast.testing import DRY_RUN, launch_on_cpu

DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
DTYPE = torch.float32 if DRY_RUN else torch.bfloat16
TINY, TINY_WINDOWS = Shape(1, 1, 20, 16), Shape(1, 1, 6, 16, grid=(2, 3), size=2)
RUNS = sized(30, 2)
SAMPLES = sized(40, 1)
KDFAST = torch.ops.kdfast
Launch = Callable[[], Any]
Rows = Iterator[dict[str, Any]]


class Attention:
    """The ops' own arguments for a shape: q, k, v packed, RoPE or not, every head kept."""

    def __init__(
        self, shape: Shape, rope: bool, dtype: torch.dtype = DTYPE, biases: int = 0
    ) -> None:
        b, h, n, d = shape.batch, shape.heads, shape.tokens, shape.dim

        def packed() -> list[Tensor]:
            x = torch.randn(b, n, 3, h, d, device=DEVICE, dtype=dtype)
            return list(x.permute(2, 0, 3, 1, 4).unbind())

        table = torch.randn(shape.size**2 or n, d, device=DEVICE)
        rotary = (table, table) if rope else (None, None)
        grid = None if shape.grid is None else list(shape.grid)
        pad = None if grid is None else torch.randn(h, d, device=DEVICE, dtype=dtype)
        self.bias = torch.randn(biases, h, n, n, device=DEVICE, dtype=dtype) if biases else None
        self.inputs, self.teacher = packed(), packed()[:2]
        self.grad = torch.randn(b, n, h, d, device=DEVICE, dtype=dtype).transpose(1, 2)
        self.tail = (*rotary, 0, True, d**-0.5)
        self.geometry = (None, *self.tail, grid, shape.size, pad)
        self.heads = list(range(h))
        self.products = products_of(self.inputs[0])

    def forward(self) -> Any:
        return KDFAST.pruned_attention(*self.inputs, *self.geometry, self.bias, self.products)

    def backward(self, out: Tensor, lse: Tensor) -> Any:
        given = (*self.inputs, out, lse, *self.geometry)
        asked = self.bias is not None
        return KDFAST.pruned_attention_bwd(self.grad, *given, self.bias, asked, self.products)

    def distill_arguments(self, kind: str = "kl") -> tuple[Any, ...]:
        heads, *rest = self.geometry
        tensors = (*self.inputs, *self.teacher)
        return (*tensors, heads, self.heads, *rest, *self.tail, 1.0, kind, self.products)

    def distill(self, kind: str = "kl") -> Any:
        return KDFAST.attention_distill(*self.distill_arguments(kind))

    def distill_backward(self, out: Tensor, stats: Tensor, kind: str = "kl") -> Any:
        one = torch.ones((), device=DEVICE)
        arguments = self.distill_arguments(kind)
        return KDFAST.attention_distill_bwd(self.grad, one, out, stats, *arguments)


def losses(rows: int, classes: int) -> Launch:
    """kd_loss with its gradient, hard targets."""
    student, teacher = (torch.randn(rows, classes, device=DEVICE, dtype=DTYPE) for _ in range(2))
    target = torch.randint(0, classes, (rows,), device=DEVICE)
    options = (4.0, 0.7, "batchmean", 0.0, -100, True)
    return lambda: KDFAST.kd_loss(student, teacher, target, *options)


def linear_losses(rows: int, classes: int, dim: int) -> Launch:
    """linear_kd_loss with its gradients, in chunks; the losses and gradients as one tuple."""
    hidden, weight = (
        torch.randn(n, dim, device=DEVICE, dtype=DTYPE, requires_grad=True) for n in (rows, classes)
    )
    teacher = torch.randn(rows, classes, device=DEVICE, dtype=DTYPE)
    target = torch.randint(0, classes, (rows,), device=DEVICE)

    def call() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss, *rest = linear_kd_loss(hidden, weight, teacher, target, chunk=-(-rows // 4))
            return loss, *rest, *torch.autograd.grad(loss, (hidden, weight))

    return call


def gated(rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and value of a packed projection, and a weight of the norm."""
    packed = torch.randn(rows, 2 * channels, device=DEVICE, dtype=DTYPE)
    return *packed.chunk(2, -1), torch.randn(channels, device=DEVICE, dtype=DTYPE)


def seconds(call: Launch) -> float:
    """Median time of the call's kernels: replays of a CUDA graph, each with a cold L2 cache."""
    if DRY_RUN:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(SAMPLES):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    del kept
    return statistics.median(times)


def attention_goals() -> Iterator[tuple[str, float]]:
    """Names as in ``GOALS`` and microseconds of G1, G2, G4 to G6 (with RoPE)."""
    plain, turned = Attention(sized(EVA, TINY), False), Attention(sized(EVA, TINY), True)
    windows = Attention(sized(ORION, TINY_WINDOWS), True)
    wide = Attention(sized(GLOBAL, TINY), True)

    def step(case: Attention) -> None:
        case.backward(*case.forward())

    def distill(case: Attention) -> None:
        out, _, stats = case.distill()
        case.distill_backward(out, stats)

    saved, saved_windows = turned.forward(), windows.forward()
    calls: list[tuple[str, Launch, Launch | None]] = [
        ("G1", turned.forward, None),
        ("G2", lambda: turned.backward(*saved), None),
        ("G4 forward", windows.forward, None),
        ("G4 backward", lambda: windows.backward(*saved_windows), None),
        ("G5", lambda: distill(plain), lambda: step(plain)),
        ("G5 RoPE", lambda: distill(turned), lambda: step(turned)),
        ("G6 RoPE", lambda: distill(wide), lambda: step(wide)),
    ]
    for name, call, without in calls:
        yield name, 1e6 * (seconds(call) - (seconds(without) if without else 0.0))


def goals() -> Rows:
    """Every goal with a time: measured, its target on an H100, and the limit of that machine."""
    known = {goal.name: goal for goal in GOALS}

    def row(name: str, us: float, target: float | None) -> dict[str, Any]:
        found = {"goal": name, "what": known[name].what, "us": us, "target_us": target}
        return found | {"limit_us": known[name].limit_us()}

    for name, us in attention_goals():
        yield row(name, us, known[name].target)
    shapes = sized([("G7", 1024, 1000), ("G7 long", 16384, 21841)], [("G7", 4, 20)])
    for name, rows, classes in shapes:
        # 85 % of the rate of a copy of that size are the goal.
        copied = 1e6 * copy_seconds(DEVICE, 3 * rows * classes * DTYPE.itemsize)
        yield row(name, 1e6 * seconds(losses(rows, classes)), copied / 0.85)


def bits(results: Sequence[Tensor]) -> list[Tensor]:
    """Copies of results as bytes, in which a NaN is equal to itself."""
    return [x.reshape(-1).clone().view(torch.uint8) for x in results]


def determinism() -> Rows:
    """Runs of the same call whose results differ in any bit from those of the first (G8)."""
    case = Attention(sized(Shape(4, 8, 577), TINY), True)
    windows = Attention(sized(Shape(2, 8, 1600, 64, (40, 40), 16), TINY_WINDOWS), True)
    out, lse = case.forward()
    w_out, w_lse = windows.forward()
    student, teacher = (torch.randn(sized(999, 5), 384, device=DEVICE) for _ in range(2))
    gate, value, weight = gated(*sized((1600, 2730), (5, 24)))
    normed, *moments = KDFAST.swiglu_norm(gate, value, weight, weight, 1e-6)
    calls: dict[str, Launch] = {
        "pruned_attention": case.forward,
        "pruned_attention_bwd": lambda: case.backward(out, lse),
        "pruned_attention_bwd, windows": lambda: windows.backward(w_out, w_lse),
        "kd_loss": losses(*sized((512, 21841), (4, 20))),
        "linear_kd_loss": linear_losses(*sized((512, 21841, 384), (5, 20, 16))),
        "feature_loss": lambda: KDFAST.feature_loss(student, teacher, "mse", "channel", True),
        "swiglu_norm": lambda: KDFAST.swiglu_norm(gate, value, weight, weight, 1e-6),
        "swiglu_norm_bwd": lambda: KDFAST.swiglu_norm_bwd(normed, gate, value, weight, *moments),
    }
    for kind in sized(("kl", "jsd", "cosine"), ("kl",)):
        distilled, _, stats = case.distill(kind)
        # Its third result has planes that no kernel writes.
        calls[f"attention_distill {kind}"] = lambda kind=kind: case.distill(kind)[:2]
        calls[f"attention_distill_bwd {kind}"] = lambda kind=kind, o=distilled, s=stats: (
            case.distill_backward(o, s, kind)
        )
    for name, call in calls.items():
        first = bits(call())
        differ = sum(not all(map(torch.equal, first, bits(call()))) for _ in range(RUNS - 1))
        yield {"call": name, "runs": RUNS, "different": differ}


def memory() -> Rows:
    """Peaks of a forward and backward pass, and what the distance to a teacher adds (G6, G9)."""
    shape = sized(GLOBAL, TINY)
    case = Attention(shape, True)

    def attention() -> None:
        case.backward(*case.forward())

    def distill() -> None:
        out, _, stats = case.distill()
        case.distill_backward(out, stats)

    one_map = shape.batch * shape.heads * shape.tokens**2 * 4
    for name, call in {"attention": attention, "attention and KL": distill}.items():
        yield {"call": name, "peak_bytes": peak_bytes(call), "fp32_map_bytes": one_map}


def main(path: Path, until: float) -> None:
    """Writes the figures to a file, row by row, and the parts that are not complete.

    What fails stops the process; what was measured before is in the file.
    """
    registered = launch_on_cpu() if DRY_RUN else None
    parts = {"determinism": determinism(), "memory": memory(), "goals": goals()}
    figures: dict[str, Any] = {name: [] for name in parts} | {"incomplete": list(parts)}
    with torch.no_grad():
        for name, rows in parts.items():
            while time.time() < until:
                row = next(rows, None)
                if row is None:
                    figures["incomplete"].remove(name)
                    break
                figures[name].append(row)
                save(figures, path)
    save(figures, path)
    del registered


def save(figures: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
