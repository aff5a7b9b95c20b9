# SPDX-License-Identifier: Apache-2.0
"""What can be said of the Triton kernels without a GPU: ``make gpu-static`` after an edit of them.

Compiles every kernel that the edit reaches for every architecture, reads the binaries and checks
them, counts bytes, products and exponentials of a call, and holds the limits that follow against
the goals. Writes bench/results/gpu_static.json; bench/gpu_tables.py makes tables of it.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from bench.gpu_cases import Case, cases, core, describe, traced_as, violations
from bench.gpu_source import ROOT, fingerprints
from bench.gpu_sweep import KERNEL, Answer, sweep
from kdfast.kernels._common import choose_tiles, useful_share, window_lengths
from kdfast.machine.files import replacing

RESULT = ROOT / "bench" / "results" / "gpu_static.json"
# Seconds between two writes of the file.
PAUSE = 30


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
        # What the maps add to the two backward launches: q, k, scores and map of the teacher.
        s.stream("maps of dq", 3 if rope else 2, 1, 1, "dq_maps"),
        s.stream("maps of dkdv", 2, 1, 1, "dkdv_maps"),
    ]


def losses(rows: int, classes: int) -> list[Work]:
    """kd_loss on bf16 logits; long rows are read twice, from L2 at best, from memory at worst."""
    passes = 3 if classes <= 8192 else 5
    sweeps = 1 if classes <= 8192 else 2
    size = rows * classes
    return [Work("rows", 2.0 * passes * size, 0.0, 3.0 * sweeps * size)]


@dataclass(frozen=True)
class Goal:
    """One goal of docs/internals/gpu.md: its launches, and microseconds to reach on an H100."""

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
    names = ("fwd", "dq", "dkdv", "distance", "dq_maps", "dkdv_maps")
    return [{"tokens": name} | {k: round(s.share(k), 3) for k in names} for name, s in sizes]


def summary(done: Mapping[Case, dict[str, Any]], failed: Mapping[Case, str]) -> dict[str, Any]:
    """The result file: figures, cases, and in words what is missing and what is not as it should.

    Args:
        done: ``trace`` and ``kernels`` of each case that is compiled from the code as it is.
        failed: Why a case could not be compiled.
    """
    every = cases()
    bad = [
        f"{describe(case, row)}: {fault}"
        for case in every
        if case in done
        for row in done[case]["kernels"]
        for fault in violations(case, row)
    ]
    return {
        "triton": triton.__version__,
        "sources": fingerprints(),
        "devices": {name: asdict(device) for name, device in DEVICES.items()},
        "goals": goals(),
        "shares": shares(),
        "violations": bad + [f"{case}: {fault}" for case, fault in failed.items()],
        "columns": list(KERNEL),
        "missing": [str(case) for case in every if case not in done],
        "compiled": [
            asdict(case) | {"trace": done[case]["trace"], "kernels": packed(done[case])}
            for case in every
            if case in done
        ],
    }


def packed(answer: Mapping[str, Any]) -> list[list[Any]]:
    """The kernels of a case as rows of values."""
    return [[row[name] for name in KERNEL] for row in answer["kernels"]]


def written(facts: Mapping[str, Any]) -> str:
    """The text of the file: a line for each case, so that a change shows as one."""
    parts = [
        f" {json.dumps(key)}: " + (lines(value) if isinstance(value, list) else json.dumps(value))
        for key, value in facts.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def lines(values: Sequence[Any]) -> str:
    return "[\n" + ",\n".join("  " + json.dumps(x) for x in values) + "\n ]" if values else "[]"


def stored(facts: Mapping[str, Any]) -> dict[Case, dict[str, Any]]:
    """The cases of a result file."""
    found = {}
    for row in facts.get("compiled", []):
        kernels = [dict(zip(facts["columns"], values, strict=True)) for values in row["kernels"]]
        case = Case(**{field.name: row[field.name] for field in fields(Case)})
        found[case] = {"trace": row["trace"], "kernels": kernels}
    return found


def changed_ops(facts: Mapping[str, Any]) -> set[str]:
    """Ops whose code is not that of a result file, so that each of its figures is in doubt."""
    if facts.get("triton") != triton.__version__:
        return set(fingerprints())
    before = facts.get("sources", {})
    return {op for op, found in fingerprints().items() if before.get(op) != found}


def current(facts: Mapping[str, Any], jobs: int) -> dict[Case, dict[str, Any]]:
    """The cases of a result file that a compiler would find as they were when it was written."""
    before, doubtful = stored(facts), changed_ops(facts)
    if facts.get("triton") != triton.__version__:
        return {}
    known = set(cases())
    asked: dict[Case, list[Case]] = {}
    for case in before:
        if case in known and case.op in doubtful:
            asked.setdefault(traced_as(case), []).append(case)
    done = {case: row for case, row in before.items() if case in known and case.op not in doubtful}
    answers = progress(sweep(asked, jobs, binaries=False), "tracing", len(asked))
    for one, answer in answers:
        if "error" in answer:
            raise RuntimeError(f"gpu_static: {one}: {answer['error']}")
        for case in asked[one]:
            if before[case]["trace"] == answer["trace"]:
                done[case] = before[case]
    return done


def progress(answers: Iterator[Answer], what: str, count: int) -> "tqdm[Answer]":
    """The answers, with a bar; in a log a line now and then."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(answers, what, count, disable=count == 0, mininterval=pause)


def main() -> int:
    """Write the result file; 1 if a kernel breaks a rule of docs/internals/gpu.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__)
    parser.add_argument("--core", action="store_true", help="only the cases that tests insist on")
    parser.add_argument("--arch", type=int, nargs="*", help="only these")
    parser.add_argument("--op", nargs="*", help="only these")
    parser.add_argument("--dtype", nargs="*", help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile [2]")
    parser.add_argument("--minutes", type=float, help="no new case after them; 0: only figures")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    # An interrupted run goes on where it was: what the compiler would not find changed, stays.
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    done = current(before, args.jobs)
    todo = [
        case
        for case in cases()
        if case not in done
        and (not args.core or core(case))
        and (not args.arch or case.arch in args.arch)
        and (not args.op or case.op in args.op)
        and (not args.dtype or case.dtype in args.dtype)
    ]
    todo.sort(key=lambda case: not core(case))
    failed: dict[Case, str] = {}
    saved = time.monotonic()
    seconds = None if args.minutes is None else 60 * args.minutes
    answers = progress(sweep(todo, args.jobs, seconds), "compiling", len(todo))
    for case, answer in answers:
        if "error" in answer:
            failed[case] = answer["error"]
            answers.write(f"{case}: {answer['error']}")
        else:
            done[case] = answer
        if time.monotonic() > saved + PAUSE:
            write(args.out, summary(done, failed))
            saved = time.monotonic()
    facts = summary(done, failed)
    write(args.out, facts)
    print("\n".join(facts["violations"]) or "no violations")
    lacking = sum(core(case) for case in cases() if case not in done)
    print(f"{len(done)} cases, {len(facts['missing'])} missing, {lacking} of them core: {args.out}")
    return bool(facts["violations"])


def write(path: Path, facts: Mapping[str, Any]) -> None:
    """The result file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(written(facts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
