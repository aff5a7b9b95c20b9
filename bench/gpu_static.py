# SPDX-License-Identifier: Apache-2.0
"""What can be said of the Triton kernels without a GPU: ``python -m bench.gpu_static``.

Compiles every kernel for every architecture, reads the binaries and checks them, counts bytes,
products and exponentials of a call, and holds the limits that follow against the goals. Writes
bench/results/gpu_static.json; bench/gpu_tables.py makes docs/gpu.md of it.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from kdfast import aot
from kdfast.kernels._common import choose_tiles, useful_share, window_lengths

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "gpu_static.json"
STREAMING = ("fwd_kernel", "_distance_kernel", "bwd_kernel")
DIMS = (16, 64, 72, 80, 88, 96, 128)
KINDS = ("reverse_kl", "jsd", "mse", "cosine", "logit_mse")


@dataclass(frozen=True)
class Device:
    """Peaks from data sheets: dense bf16 products with fp32 sums, memory, and exp2 (16 per SM)."""

    flops: float
    bandwidth: float
    exps: float


DEVICES = {
    "H100 SXM": Device(989e12, 3.35e12, 132 * 16 * 1.755e9),
    "A100 80GB": Device(312e12, 2.04e12, 108 * 16 * 1.41e9),
    # GeForce multiplies at half rate with fp32 sums; clock taken as 2.0 GHz.
    "RTX 4050 laptop": Device(20e12, 0.192e12, 20 * 16 * 2.0e9),
}
H100 = DEVICES["H100 SXM"]


@dataclass(frozen=True)
class Work:
    """What one launch moves and computes; ``flops`` and ``exps`` include what tiles waste."""

    kernel: str
    bytes: float
    flops: float = 0.0
    exps: float = 0.0

    def seconds(self, device: Device) -> float:
        """The longest of its three limits, as if the others were hidden behind it."""
        return max(
            self.bytes / device.bandwidth, self.flops / device.flops, self.exps / device.exps
        )


@dataclass(frozen=True)
class Shape:
    """One bf16 attention call with every head kept."""

    batch: int
    heads: int
    tokens: int
    dim: int = 64
    grid: tuple[int, int] | None = None
    size: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        return window_lengths(self.tokens, self.grid, self.size)

    @property
    def tensor(self) -> float:
        """Bytes of q."""
        return 2.0 * self.batch * self.heads * self.tokens * self.dim

    def share(self, kernel: str) -> float:
        return useful_share(self.lengths, choose_tiles(kernel, self.lengths, self.dim, 2))

    def stream(
        self, kernel: str, tensors: float, products: float, exps: float, tiles: str = ""
    ) -> Work:
        """A streaming kernel: ``tensors`` moved, N^2 D products (2 FLOP each), N^2 exponentials."""
        pairs = self.batch * self.heads * sum(n * n for n in self.lengths)
        pairs /= self.share(tiles or kernel)
        flops = 2 * products * pairs * self.dim
        return Work(kernel, tensors * self.tensor, flops, exps * pairs)

    def rotations(self, tensors: int) -> list[Work]:
        """Rotated copies; the tables stay in L2."""
        return [Work("rotate", 2 * self.tensor)] * tensors


def forward(s: Shape) -> list[Work]:
    return [*s.rotations(1), s.stream("fwd", 4, 2, 1)]


def backward(s: Shape) -> list[Work]:
    # The keys' copy; dq reads q, k, v, out and grad, writes dq and the copy of q that dkdv reads.
    return [*s.rotations(1), s.stream("dq", 7, 3, 1), s.stream("dkdv", 6, 4, 1)]


def distill(s: Shape, rope: bool) -> list[Work]:
    """What KL at T = 1 adds to the attention's forward and backward."""
    return [
        # Of the teacher: k in both passes; the launch of dq writes the copy of q.
        *(s.rotations(2) if rope else []),
        s.stream("distance", 4, 2, 1),
        # The rider's share of the two backward launches: q, k, scores and map of the teacher.
        s.stream("rider of dq", 3 if rope else 2, 1, 1, "dq_rider"),
        s.stream("rider of dkdv", 2, 1, 1, "dkdv_rider"),
    ]


def losses(rows: int, classes: int) -> list[Work]:
    """kd_loss on bf16 logits; long rows are read twice, from L2 at best, from memory at worst."""
    passes = 3 if classes <= 8192 else 5
    sweeps = 1 if classes <= 8192 else 2
    size = rows * classes
    return [Work("rows", 2.0 * passes * size, 0.0, 3.0 * sweeps * size)]


@dataclass(frozen=True)
class Goal:
    """One goal of docs/gpu.md: its launches, and microseconds to reach on an H100."""

    name: str
    what: str
    launches: list[Work]
    target: float | None

    def limit_us(self, device: Device = H100) -> float:
        """No launch faster than its own limit, and no overlap between launches."""
        return 1e6 * sum(work.seconds(device) for work in self.launches)


EVA = Shape(64, 16, 257)
ORION = Shape(22, 16, 1600, grid=(40, 40), size=16)
GLOBAL = Shape(8, 16, 1600)
GOALS = (
    Goal("G1", "attention forward with RoPE, 64x16x257", forward(EVA), 60),
    Goal("G2", "attention backward with RoPE, 64x16x257", backward(EVA), 160),
    Goal("G4 forward", "ORION's windows with RoPE, 22 images", forward(ORION), 160),
    Goal("G4 backward", "ORION's windows with RoPE, 22 images", backward(ORION), 420),
    Goal("G5", "attention KL added, 64x16x257", distill(EVA, False), 110),
    Goal("G5 RoPE", "attention KL added, 64x16x257, RoPE", distill(EVA, True), 110),
    Goal("G6", "attention KL added, 8x16x1600", distill(GLOBAL, False), 320),
    Goal("G6 RoPE", "attention KL added, 8x16x1600, RoPE", distill(GLOBAL, True), 320),
    Goal("G7", "kd_loss, 1024 x 1000", losses(1024, 1000), None),
    Goal("G7 long", "kd_loss, 16384 x 21841", losses(16384, 21841), None),
)


@dataclass(frozen=True)
class Case:
    """One launch to compile: an op of kdfast.aot, its dtype, size and options."""

    op: str
    dtype: str
    dim: int
    options: tuple[tuple[str, Any], ...] = ()


def cases(arch: int) -> Iterator[Case]:
    """What is compiled: on sm_80 every head dim and entry of the block table, elsewhere fewer.

    fp16 is bf16 with other conversions; 80 and 96 have the tiles of 72 and 88 without their masks.
    """
    first, second = arch == 80, arch == 90
    half = DIMS if first else (64, 72, 88, 128) if second else (64, 72, 128)
    full = (16, 64, 72, 88, 128) if first else (64, 88) if second else (88,)
    for dim in half:
        yield Case("pruned_attention", "bfloat16", dim)
    for dim in (64, 72, 88, 128) if first else (64, 72, 128) if second else (64, 128):
        yield Case("attention_distill", "bfloat16", dim)
    for dim in full if arch != aot.AMD else ():
        yield Case("pruned_attention", "float32", dim)
    for dim in full[1:] if first or second else ():
        yield Case("attention_distill", "float32", dim)
    yield Case("pruned_attention", "bfloat16", 64, (("window", 16),))
    if first or second:
        yield Case("pruned_attention", "float16", 64)
    for dtype in ("bfloat16", "float32", "float16") if first else ("bfloat16",):
        yield Case("kd_loss", dtype, 1000, (("target", "indices"),))
        yield Case("kd_loss", dtype, 21841, (("target", "indices"),))
        yield Case("feature_loss", dtype, 1024, (("kind", "cosine"), ("normalize", "channel")))
        yield Case("swiglu_norm", dtype, 2730)
    if first:
        yield Case("attention_distill", "float16", 64)
        yield Case("pruned_attention", "bfloat16", 64, (("layout", "half"), ("tokens", 197)))
        yield Case("pruned_attention", "bfloat16", 64, (("layout", ""), ("tokens", 577)))
        # Shorter sequences take smaller blocks.
        for dim in (64, 128):
            yield Case("pruned_attention", "bfloat16", dim, (("tokens", 20),))
            yield Case("attention_distill", "bfloat16", dim, (("tokens", 20),))
        yield Case("pruned_attention", "bfloat16", 128, (("tokens", 197),))
    for kind in KINDS if first else ():
        yield Case("attention_distill", "bfloat16", 64, (("kind", kind), ("temperature", 2)))


def compiled(case: Case, arch: int) -> list[dict[str, Any]]:
    """The kernels of one case on one architecture, each once."""
    with aot.compile_only(arch) as made:
        aot.OPS[case.op](getattr(torch, case.dtype), case.dim, **dict(case.options))
    labels = asdict(case) | {"options": options(case)}
    rows = {}
    for kernel in made:
        row = labels | asdict(kernel) | {"occupancy": kernel.occupancy}
        rows[json.dumps([row["name"], row["constants"]], default=str)] = row
    return list(rows.values())


def violations(row: dict[str, Any]) -> list[str]:
    """What a compiled kernel does not keep to of docs/gpu.md."""
    found = []
    # The blocks are chosen for NVIDIA's GPUs; what AMD's spill is shown, but no failure.
    if row["arch"] != aot.AMD and row["spill_bytes"] > aot.SPILL_BUDGET:
        found.append(f"{row['spill_bytes']} bytes of registers spilled")
    if row["shared_bytes"] > aot.SHARED_LIMIT[row["arch"]]:
        found.append(f"{row['shared_bytes']} bytes of shared memory")
    if (row["tensor_core"] > 0) != (row["name"] in STREAMING):
        found.append(f"{row['tensor_core']} tensor-core instructions")
    wide = row["name"] in STREAMING or row["name"] in ("rotate_kernel", "_positions_kernel")
    if wide and row["dim"] >= 64 and not row["loads_16"]:
        found.append("no 16-byte loads")
    return found


def arch_name(arch: int) -> str:
    return "gfx942" if arch == aot.AMD else f"sm_{arch}"


def describe(row: dict[str, Any]) -> str:
    """A kernel in words."""
    part = {True: " of keys", False: " of queries"}.get(row["constants"].get("KEYS"), "")
    where = (
        f"{arch_name(row['arch'])} {row['op']} {row['dtype']} {row['dim']} {row['options']}".strip()
    )
    return f"{where}, {row['name']}{part}"


def goals() -> list[dict[str, Any]]:
    """The limits of every goal on every device."""
    rows = []
    for goal in GOALS:
        limits = {name: goal.limit_us(device) for name, device in DEVICES.items()}
        total = {k: sum(getattr(w, k) for w in goal.launches) for k in ("bytes", "flops", "exps")}
        row = {"goal": goal.name, "what": goal.what, "target_us": goal.target, "limit_us": limits}
        rows.append(row | total | {"launches": [asdict(w) for w in goal.launches]})
    return rows


def shares() -> list[dict[str, Any]]:
    """Useful share of the tile area (G3)."""
    sizes = [(str(n), Shape(1, 1, n)) for n in (197, 256, 257, 577, 1600)]
    sizes.append(("40 x 40 in windows of 16", Shape(1, 1, 1600, grid=(40, 40), size=16)))
    names = ("fwd", "dq", "dkdv", "distance", "dq_rider", "dkdv_rider")
    return [{"tokens": name} | {k: round(s.share(k), 3) for k in names} for name, s in sizes]


def summary(rows: list[dict[str, Any]], source: dict[str, str]) -> dict[str, Any]:
    """The result file for these kernels."""
    rows = sorted(rows, key=lambda row: (row["arch"], *label(row)))
    bad = [f"{describe(row)}: {v}" for row in rows for v in violations(row)]
    devices = {name: asdict(device) for name, device in DEVICES.items()}
    facts = {"source": source, "devices": devices, "goals": goals(), "shares": shares()}
    done = {(row["arch"], *label(row)) for row in rows}
    facts["cases"] = {
        arch_name(arch): [sum(key[0] == arch for key in done), len(list(cases(arch)))]
        for arch in aot.SHARED_LIMIT
    }
    return facts | {"violations": bad, "kernels": rows}


def sources() -> dict[str, str]:
    """For each op a fingerprint of the compiler and of the kernels that it launches."""
    return {op: _fingerprint(op) for op in aot.OPS}


def _fingerprint(op: str) -> str:
    """Of the op's file of kernels and of those that it imports."""
    texts: dict[str, str] = {}
    wanted = [op]
    while wanted:
        name = wanted.pop()
        if name not in texts:
            texts[name] = (ROOT / "kernels" / f"{name}.py").read_text(encoding="utf-8")
            wanted += re.findall(r"from kdfast\.kernels\.(\w+) import", texts[name])
            for names in re.findall(r"from kdfast\.kernels import ([\w, ]+)", texts[name]):
                wanted += names.split(", ")
    digest = hashlib.sha256(triton.__version__.encode())
    for name in sorted(texts):
        digest.update(texts[name].encode())
    return digest.hexdigest()[:16]


def label(row: dict[str, Any]) -> tuple[Any, ...]:
    """What names the case of a kernel."""
    return row["op"], row["dtype"], row["dim"], row["options"]


def options(case: Case) -> str:
    return " ".join(f"{name}={value}" for name, value in case.options)


def main() -> int:
    """Writes the result file; 1 if a kernel does not keep to what docs/gpu.md promises."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static")
    parser.add_argument("--arch", type=int, nargs="*", default=list(aot.SHARED_LIMIT))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    # One case takes seconds and all of them many minutes: an interrupted run goes on where it was.
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    source, old = sources(), before.get("source", {})
    rows = [row for row in before.get("kernels", []) if old.get(row["op"]) == source[row["op"]]]
    done = {(row["arch"], *label(row)) for row in rows}
    todo = [(arch, case) for arch in args.arch for case in cases(arch)]
    # What every architecture has comes first.
    for arch, case in sorted(todo, key=lambda x: (x[1].dim != 64, x[1].dtype, x[1].options != ())):
        labels = asdict(case) | {"options": options(case)}
        if (arch, *label(labels)) in done:
            continue
        rows += compiled(case, arch)
        args.out.write_text(json.dumps(summary(rows, source), indent=1) + "\n")
        print(f"{arch_name(arch)} {' '.join(map(str, label(labels)))}", flush=True)
    facts = summary(rows, source)
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print("\n".join(facts["violations"]) or "no violations")
    return bool(facts["violations"])


if __name__ == "__main__":
    sys.exit(main())
