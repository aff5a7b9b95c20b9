# SPDX-License-Identifier: Apache-2.0
"""What several launchers need: the tiles of a launch, head tables, sums."""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels._blocks import TWO, Blocks, table

Result = TypeVar("Result")

# Least share of the computed score tiles that holds real (query, key) pairs.
USEFUL_SHARE = 0.75
SMALLEST = 16  # side of the smallest tile that tensor cores take


class Tiles(NamedTuple):
    """Blocks of one launch: resident rows, and the columns that stream past them.

    A last block of rows (columns) that is not full is computed with ``row_tail`` (``col_tail``)
    rows instead; 0 if every block is full.
    """

    rows: int
    row_tail: int
    cols: int
    col_tail: int
    warps: int
    stages: int


# Rows of the element-wise kernels.
PLAIN_ROWS = 32
# Values that ``total_kernel`` adds at a time.
SUM_BLOCK = 4096


def tail(lengths: Sequence[int], block: int) -> int:
    """Size of the last, partial block of ``block`` that fits every length; 0 if all are full."""
    left = max(n % block for n in lengths)
    return 0 if left == 0 else min(block, max(SMALLEST, power_of_two(left)))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def useful_share(lengths: Sequence[int], tiles: Tiles) -> float:
    """Share of the computed score tiles that holds real pairs, for windows of these lengths."""
    computed = 0
    for n in lengths:
        rows = n // tiles.rows * tiles.rows + (tiles.row_tail if n % tiles.rows else 0)
        computed += rows * (n // tiles.cols * tiles.cols + tiles.col_tail)
    return sum(n * n for n in lengths) / computed


@functools.cache
def window_lengths(tokens: int, grid: tuple[int, ...] | None, size: int) -> tuple[int, ...]:
    """Real tokens of every window of a token grid; (tokens,) without windows."""
    if grid is None:
        return (tokens,)
    rows, cols = ([min(size, n - i) for i in range(0, n, size)] for n in grid)
    return tuple(r * c for r in rows for c in cols)


@functools.cache
def choose_tiles(
    kernel: str, lengths: tuple[int, ...], head_dim: int, itemsize: int, arch: str = ""
) -> Tiles:
    """Blocks for windows of ``lengths`` tokens: the first choice with a useful share of 75 %.

    Args:
        kernel: As in ``BLOCKS``.
        lengths: Tokens of every window, or the one length of global attention.
        head_dim: At most 128.
        itemsize: Bytes of an element, 2 or 4.
        arch: Of the GPU, as ``architecture`` gives it.
    """
    return fitted(table(arch).blocks[kernel, table_width(head_dim, itemsize), itemsize], lengths)


def fitted(blocks: Blocks, lengths: tuple[int, ...]) -> Tiles:
    """What a call with windows of these lengths takes of the blocks of an entry."""
    longest = max(SMALLEST, power_of_two(max(lengths)))
    cols = min(blocks.cols, longest)
    fitting = [(r, warps) for r, warps in blocks.rows if r <= longest] or [(longest, 4)]
    rest = tail(lengths, cols)
    choices = [Tiles(r, tail(lengths, r), cols, rest, w, blocks.stages) for r, w in fitting]
    good = [t for t in choices if useful_share(lengths, t) >= USEFUL_SHARE]
    return good[0] if good else max(choices, key=lambda t: useful_share(lengths, t))


def table_width(head_dim: int, itemsize: int) -> int:
    """The width under which ``BLOCKS`` has a head dim."""
    if itemsize == 4 and chunks(head_dim, itemsize)[1]:
        return TWO
    return 64 if head_dim <= 64 else 128


def chunks(head_dim: int, itemsize: int) -> tuple[int, int]:
    """``head_dim`` as two tile widths, powers of two: 72 is (64, 16), 64 is (64, 0).

    The second is 0 where two tiles would be as wide as one: 24 is (32, 0). In fp32 it is half of
    the first at least, (64, 32): of narrower ones several warps would compute the same.
    """
    whole = max(SMALLEST, power_of_two(head_dim))
    low = whole // 2
    least = max(SMALLEST, low // 2 if itemsize == 4 else 0)
    high = max(least, power_of_two(max(1, head_dim - low)))
    return (low, high) if high < low else (whole, 0)


def alignment(*tensors: Tensor) -> int:
    """The largest power of two, up to 16, that divides all strides but the last, in elements."""
    common = 16
    for x in tensors:
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size > 1:
                common = math.gcd(common, stride)
    return common


def unit_stride(x: Tensor) -> Tensor:
    """``x``, copied only where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dot_precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply ``dtype``: fp32 keeps its accuracy unless the user allowed TF32."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@functools.lru_cache(maxsize=4096)
def head_table(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """(K,) int32 head indices on ``device``: copied once, so that later calls can be captured.

    Raises:
        RuntimeError: First use during the capture of a CUDA graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"kdfast: heads {list(heads)} are new on {device} and cannot be copied there while a "
            "CUDA graph is captured; call the op once before the capture"
        )
    if device.type != "cuda":
        return torch.tensor(heads, dtype=torch.int32, device=device)
    # torch.compile(mode="reduce-overhead") gives all GPU memory that the current thread allocates
    # to its graphs, and refuses what outlives the call, as this table does.
    return in_a_thread(torch.tensor, heads, dtype=torch.int32, device=device)


def in_a_thread(call: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """``call(*args, **options)``, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *args, **options).result()


@triton.jit
def total_kernel(part_ptr, loss_ptr, parts, divisor, BLOCK: tl.constexpr):
    """The sum of the parts over ``divisor``, in fp64 and in one order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, parts, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + i, mask=i < parts, other=0.0).to(tl.float64)
    tl.store(loss_ptr, (tl.sum(total, 0) / divisor).to(tl.float32))
