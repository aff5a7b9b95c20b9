# SPDX-License-Identifier: Apache-2.0
"""What ``python -m bench.gpu --tune`` measures: calls of docs/internals/gpu.md, and block sizes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.gpu_limits import EVA, GLOBAL, ORION, Shape
from kdfast.kernels._blocks import Blocks, Key
from kdfast.kernels._common import fitted, table_width
from kdfast.testing import DRY_RUN

# Kernels of a call, by pass. A kernel is timed as the pass that launches it, with the others as
# they are.
PASSES = {
    "plain": {"forward": ("fwd",), "backward": ("dkdv", "dq")},
    "maps": {"forward": ("distance",), "backward": ("dkdv_maps", "dq_maps")},
    "bias": {"forward": ("fwd_bias",), "backward": ("dkdv_bias", "dq_bias", "dbias")},
}
# The largest and the smallest block, the most stages, and the warps that are tried.
LARGEST, SMALLEST, STAGES, WARPS = 128, 16, 4, (4, 8)


@dataclass(frozen=True)
class Setup:
    """A call that is timed.

    Attributes:
        kind: Of ``PASSES``.
        shape: Of q, k and v.
        images: Images (windows) of the same call where results are checked: as few as leave what
            the compiler knows of its numbers (a multiple of 16 or not) as it is.
        dtype: Of q, k and v.
        rope: Whether there are rotary tables.
        biases: G of (G, H, N, N).
    """

    kind: str
    shape: Shape
    images: int
    dtype: str = "bfloat16"
    rope: bool = True
    biases: int = 0

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def __str__(self) -> str:
        s = self.shape
        words = [self.kind, f"{s.batch}x{s.heads}x{s.tokens}x{s.dim}", self.dtype]
        words += ["windows"] if s.grid else []
        return " ".join([*words, *(["RoPE"] if self.rope else [])])


@dataclass(frozen=True)
class Entry:
    """An entry of the table of blocks, and the calls that say which are best."""

    key: Key
    direction: str  # forward or backward
    setups: tuple[int, ...]  # places in ``SETUPS``


SETUPS = (
    # Head dims up to 64 in bf16: ORION, a ViT-L of 257 tokens, a ViT-B without rotation.
    Setup("plain", EVA, 1),
    Setup("plain", GLOBAL, 1),
    Setup("plain", ORION, 1),
    Setup("plain", Shape(64, 12, 197), 4, rope=False),
    Setup("maps", EVA, 1),
    Setup("maps", GLOBAL, 1),
    # BEiT-B, and Swin's first stage with its shift masks.
    Setup("bias", Shape(32, 12, 197), 4, rope=False, biases=1),
    Setup("bias", Shape(512, 3, 49, 32), 128, rope=False, biases=64),
    # Head dims up to 128: ViT-H, in two tiles, and one wide tile.
    Setup("plain", Shape(64, 16, 257, 80), 1),
    Setup("plain", Shape(16, 16, 577, 128), 1, rope=False),
    Setup("maps", Shape(32, 16, 257, 80), 1),
    Setup("bias", Shape(32, 16, 257, 80), 1, rope=False, biases=1),
    # fp32: one tile, two tiles, and one wide tile.
    Setup("plain", Shape(16, 16, 257), 1, "float32"),
    Setup("maps", Shape(16, 16, 257), 1, "float32"),
    Setup("bias", Shape(16, 12, 197), 4, "float32", False, 1),
    Setup("plain", Shape(16, 16, 257, 80), 1, "float32"),
    Setup("maps", Shape(16, 16, 257, 80), 1, "float32"),
    Setup("bias", Shape(16, 16, 257, 80), 1, "float32", False, 1),
    Setup("plain", Shape(16, 16, 257, 128), 1, "float32"),
    Setup("maps", Shape(16, 16, 257, 128), 1, "float32"),
    Setup("bias", Shape(16, 16, 257, 128), 1, "float32", False, 1),
)
TINY = (Setup("plain", Shape(1, 1, 20, 16), 1, "float32"),)
# Shapes at which flash-attn is asked whether it is faster: tokens by heads of all images.
FLASH_TOKENS = {197: 768, 257: 1024, 577: 256, 1024: 256, 1600: 128}
FLASH_DIMS = (64, 80, 128)
FLASH_DTYPES = ("bfloat16", "float16")


def setups() -> tuple[Setup, ...]:
    """The calls; in a dry run one that takes no time."""
    return TINY if DRY_RUN else SETUPS


def key_of(kernel: str, setup: Setup) -> Key:
    """The entry of the table that a kernel takes its blocks from in a call."""
    return kernel, table_width(setup.shape.dim, setup.itemsize), setup.itemsize


def entries() -> list[list[Entry]]:
    """The entries in waves, the most telling first; what a wave compiles it compiles at once."""
    found: dict[Key, tuple[str, list[int]]] = {}
    for place, setup in enumerate(setups()):
        for direction, kernels in PASSES[setup.kind].items():
            for kernel in kernels:
                found.setdefault(key_of(kernel, setup), (direction, []))[1].append(place)
    waves: dict[Any, list[Entry]] = {}
    for key, (direction, places) in found.items():
        kind = setups()[places[0]].kind
        waves.setdefault((key[2], key[1] == 128, kind), []).append(
            Entry(key, direction, tuple(places))
        )
    return list(waves.values())


def neighbours(blocks: Blocks) -> Iterator[Blocks]:
    """Blocks that differ in one thing: columns, stages, warps, or which rows come first."""
    (rows, warps), *others = blocks.rows
    for cols in (blocks.cols // 2, blocks.cols * 2):
        if SMALLEST <= cols <= LARGEST:
            yield blocks._replace(cols=cols)
    for stages in (blocks.stages - 1, blocks.stages + 1):
        if 1 <= stages <= STAGES:
            yield blocks._replace(stages=stages)
    for other in WARPS:
        if other != warps:
            yield blocks._replace(rows=((rows, other), *others))
    if others:
        yield blocks._replace(rows=tuple(others))
    if rows < LARGEST:
        for more in WARPS:
            yield blocks._replace(rows=((2 * rows, more), *blocks.rows))
    elif rows // 2 not in (size for size, _ in others):
        yield blocks._replace(rows=((rows // 2, warps), *others))


def changes(blocks: Blocks, other: Blocks, setup: Setup) -> bool:
    """Whether a call is launched in another way with the other blocks of its entry."""
    lengths = setup.shape.lengths
    return fitted(blocks, lengths) != fitted(other, lengths)
