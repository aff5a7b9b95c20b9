# SPDX-License-Identifier: Apache-2.0
"""Bytes, products and exponentials of a call, the limits that follow, and the goals.

Nothing here is measured: the peaks are those of data sheets.
"""

from dataclasses import asdict, dataclass
from typing import Any

from kdfast.kernels._common import choose_tiles, useful_share, window_lengths


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
