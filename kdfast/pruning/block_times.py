# SPDX-License-Identifier: Apache-2.0
"""How long blocks take by their numbers of heads and hidden units, measured on this machine.

See docs/use/pruning.md.
"""

import copy
import os
import statistics
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from kdfast.machine.timing import interleave
from kdfast.nn import accelerate
from kdfast.nn.attention import qualified_name
from kdfast.pruning.adapter import Anatomy, Site
from kdfast.pruning.constant import drop_blocks
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.latency_file import NUMBERS, Origin, Setting, read_table, write_table
from kdfast.pruning.surgery import prune_heads

# Samples of every model, and how many of them count.
ROUNDS, FASTEST = 7, 3
# Projections of a table on those that never fall; a dozen are enough for what noise does.
PASSES, POLISHES = 1000, 20
# Of a block's widths so many are measured, from nothing to all.
HEADS = 7
SHARES = (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
# Blocks of one shape are measured together, in a model of as many of them as take so long.
MODEL_SECONDS = 0.15
Counts = tuple[int, int]


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds of one block of a shape, beyond what is left of it when it is empty.

    Attributes:
        blocks: Indices of the blocks of that shape.
        heads: Numbers of heads that were measured, from 0 to all.
        units: Numbers of hidden units that were measured, from 0 to all.
        ms: By heads, then units; it never falls as either grows.
    """

    blocks: list[int]
    heads: list[int]
    units: list[int]
    ms: list[list[float]]

    def at(self, heads: int, units: int) -> float:
        """The time for any numbers, linear between the measured ones."""
        i, x = _between(self.heads, heads)
        j, y = _between(self.units, units)
        rows = [
            self.ms[k][j] + (y and y * (self.ms[k][j + 1] - self.ms[k][j]))
            for k in ((i, i + 1) if x else (i,))
        ]
        return rows[0] + x * (rows[-1] - rows[0])


@dataclass(frozen=True)
class LatencyTable:
    """Times of one model's blocks; a result of ``kdfast.latency_table``.

    Attributes:
        dense_ms: The whole model.
        fixed_ms: What no choice changes: the whole model with every block empty.
        spread: Distance of the quartiles of the whole model's time, as a share of it.
        kinds: Blocks by their shapes.
        setting: What the times belong to: model, machine, batch, dtype, threads.
        origin: Where the times are from, in words.
    """

    dense_ms: float
    fixed_ms: float
    spread: float
    kinds: list[BlockTimes]
    setting: Setting
    origin: Origin

    def kind(self, block: int) -> BlockTimes:
        """The times of a block."""
        return next(kind for kind in self.kinds if block in kind.blocks)

    def predict(self, heads: Sequence[int], units: Sequence[int]) -> float:
        """Milliseconds of the model with these numbers of heads and hidden units per block.

        Args:
            heads: One number per block.
            units: The same; all of them where it is empty, as for models without such MLPs.
        """
        widths = units or [self.kind(block).units[-1] for block in range(len(heads))]
        counts = enumerate(zip(heads, widths, strict=True))
        return self.fixed_ms + sum(self.kind(block).at(*pair) for block, pair in counts)


def latency_table(
    model: nn.Module,
    *,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    image_size: tuple[int, int] | None = None,
    cache: str | os.PathLike[str] | bool = True,
    progress: bool = True,
) -> LatencyTable:
    """Measures how long every block of a model takes by its numbers of heads and hidden units.

    The model is run as it will be run: accelerated by ``kdfast.accelerate``, in inference mode, by
    as many threads as torch has now. Blocks are timed inside of the model, not alone on warm
    caches: models whose blocks of one shape all have the same numbers alternate with the whole
    model, and only their ratios to it count, so a machine that changes its speed does no harm.
    Blocks of equal shape are measured once. Between the measured numbers times are interpolated.

    Args:
        model: A model of a family in docs/use/pruning.md. It is not changed.
        batch: Images of a call.
        dtype: Type in which the model runs; None: its own.
        image_size: (height, width); None: the model's own.
        cache: Keep the table on disk, by machine, model, batch, type and threads, and read it from
            there: True for the folder ``KDFAST_CACHE`` (``~/.cache/kdfast``), or a folder. False:
            measure, and keep nothing.
        progress: Show a progress bar on a terminal.

    Raises:
        TypeError: The model's family is not known, or ``dtype`` is not a floating type.
        ValueError: ``batch`` is below 1, or the model does not run on images of that size.
    """
    anatomy = anatomy_of("latency_table", model)
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"latency_table: batch must be an int of at least 1, got {batch!r}")
    own = next(model.parameters()).dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"latency_table: dtype must be a floating type of torch, got {dtype!r}")
    size = image_size or anatomy.adapter.image_size(model)
    setting = Setting.of(model, batch, dtype or own, size)
    found = read_table(setting, cache)
    if isinstance(found, Origin):
        table = _Measurement(anatomy, setting, size, progress).table(found)
        write_table(setting, _content(table), cache)
        return table
    content, origin = found
    kinds = [BlockTimes(**kind) for kind in content["kinds"]]
    dense, fixed, spread = (content[name] for name in NUMBERS)
    return LatencyTable(dense, fixed, spread, kinds, setting, origin)


def _content(table: LatencyTable) -> dict[str, Any]:
    """The table's part of its file."""
    kinds = [vars(kind) for kind in table.kinds]
    numbers = {name: getattr(table, name) for name in NUMBERS}
    return {**numbers, "kinds": kinds}


def unit_step(count: int) -> int:
    """Hidden units are removed in such steps: kernels are made for multiples of them."""
    return next(step for step in (32, 16, 8, 4, 2, 1) if count >= 8 * step or step == 1)


def head_grid(site: Site) -> list[int]:
    """Numbers of heads to measure, whole groups."""
    groups = len(site.held) // site.group
    steps = min(groups, HEADS - 1) or 1
    return sorted({round(groups * i / steps) * site.group for i in range(steps + 1)})


def unit_grid(count: int) -> list[int]:
    """Numbers of hidden units to measure."""
    step = unit_step(count)
    inner = {round(share * count / step) * step for share in SHARES[:-1]}
    return sorted({x for x in inner if x < count} | {count})


def added(
    ms: Sequence[Sequence[float]], heads: Sequence[int], units: Sequence[int]
) -> list[list[float]]:
    """The table with sums of a time of the attention and one of the MLP, where there are both.

    They run one after the other, so that is what such times are; and noise, of which this leaves
    far less. Where heads or hidden units are none, a block takes another way: as measured. By
    Tukey's median polish.
    """
    x = np.array(ms, dtype=float)
    inside = np.ix_(np.array(heads) > 0, np.array(units) > 0)
    rest = x[inside]
    if rest.size:
        for _ in range(POLISHES):
            for axis in range(2):
                rest = rest - np.median(rest, axis=axis, keepdims=True)
        x[inside] -= rest
    table: list[list[float]] = x.tolist()
    return table


def monotone(ms: Sequence[Sequence[float]]) -> list[list[float]]:
    """The nearest table, in the mean square, whose rows and columns never fall, from 0 on.

    Falls are noise: less work does not take longer. By Dykstra's alternating projections.
    """
    x = np.array(ms, dtype=float)
    steps = [np.zeros_like(x), np.zeros_like(x)]
    for _ in range(PASSES):
        before = x
        for axis in range(2):
            moved = x + steps[axis]
            x = np.apply_along_axis(_rising, axis, moved)
            steps[axis] = moved - x
        if np.abs(x - before).max() < 1e-9 * (1e-9 + np.abs(x).max()):
            break
    # What is left after the last pass is rounding. The first entry is 0 by definition.
    x = np.maximum.accumulate(np.maximum.accumulate(x, 0), 1)
    rising: list[list[float]] = (x - x[0, 0]).tolist()
    return rising


def _rising(values: np.ndarray) -> np.ndarray:
    """The nearest sequence that never falls: neighbours that fall are pooled at their mean."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])


def _between(grid: Sequence[int], value: int) -> tuple[int, float]:
    """Index of the measured number below a value, and how far it is to the next, in [0, 1)."""
    if not grid[0] <= value <= grid[-1]:
        raise ValueError(f"latency_table: must be in [{grid[0]}, {grid[-1]}], got {value}")
    i = bisect_right(grid, value) - 1
    return i, 0.0 if value == grid[i] else (value - grid[i]) / (grid[i + 1] - grid[i])


def same_shapes(anatomy: Anatomy, size: tuple[int, int]) -> list[list[int]]:
    """Indices of blocks, those together that take the same time: same class, tensors, tokens."""
    flops, _ = anatomy.adapter.flops(anatomy.model, size)
    kinds: dict[Any, list[int]] = {}
    for index, (block, cost) in enumerate(zip(anatomy.blocks, flops, strict=True)):
        shapes = tuple((name, tuple(x.shape)) for name, x in block.state_dict().items())
        kinds.setdefault((qualified_name(block), cost, shapes), []).append(index)
    return list(kinds.values())


def paired(whole: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, list[float]]:
    """Time of the other as a multiple of the whole's, and the whole's times in ms.

    Both are the means of the fastest samples.
    """
    samples = interleave({"whole": whole, "other": other}, rounds=ROUNDS)
    first, second = ([s for s, _ in samples[name]] for name in ("whole", "other"))
    return fastest(second) / fastest(first), [1e3 * s for s in first]


def fastest(seconds: Sequence[float]) -> float:
    """The mean of the fastest samples: others on the machine only ever add time."""
    return statistics.fmean(sorted(seconds)[:FASTEST])


class _Measurement:
    """Builds models with blocks of some size and times them.

    Attributes:
        anatomy: Of a copy of the model, in the type in which it runs.
        images: What it is called with.
    """

    def __init__(
        self, anatomy: Anatomy, setting: Setting, size: tuple[int, int], progress: bool
    ) -> None:
        model = copy.deepcopy(anatomy.model).to(setting.torch_dtype).eval().requires_grad_(False)
        self.anatomy = Anatomy.of(anatomy.adapter, model)
        self.setting, self.progress = setting, progress
        self.groups = same_shapes(anatomy, size)
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = 3 if first is None else first.in_channels
        like = next(model.parameters())
        images = torch.randn(setting.batch, channels, *size)
        self.images = images.to(like.device, setting.torch_dtype)

    def table(self, origin: Origin) -> LatencyTable:
        """Measures everything."""
        sites, mlps = self.anatomy.attentions, self.anatomy.mlps
        grids = [
            (head_grid(sites[g[0]]), unit_grid(len(mlps[g[0]].held)) if mlps else [0])
            for g in self.groups
        ]
        points = sum(len(heads) * len(units) for heads, units in grids)
        dense = self._call(self._built(self.anatomy, {}))
        bar = tqdm(
            total=points + len(grids),
            desc="latencies",
            unit="model",
            disable=None if self.progress else True,
        )
        with bar:
            seconds: list[float] = []
            empty = self._frame([])
            ratio, times = paired(dense, self._call(self._built(empty, {})))
            seconds += times
            kinds = []
            for group, (heads, units) in zip(self.groups, grids, strict=True):
                ms = self._kind(dense, group, heads, units, ratio, seconds, bar)
                smooth = monotone(added(ms, heads, units))
                kinds.append(BlockTimes(group, heads, units, smooth))
        quarter = statistics.quantiles(seconds, n=4)
        middle = statistics.median(seconds)
        # Blocks and the rest make up the whole model's time, whatever noise says.
        sums = sum(kind.ms[-1][-1] * len(kind.blocks) for kind in kinds)
        # Where noise hides all blocks, the whole time is fixed.
        fixed = middle * min(ratio, 1.0) if sums > 0 else middle
        scale = (middle - fixed) / sums if sums > 0 else 0.0
        kinds = [replace(k, ms=[[scale * x for x in row] for row in k.ms]) for k in kinds]
        spread = (quarter[2] - quarter[0]) / middle
        return LatencyTable(middle, fixed, spread, kinds, self.setting, origin)

    def _kind(
        self,
        dense: Callable[[], Any],
        group: list[int],
        heads: list[int],
        units: list[int],
        empty: float,
        seconds: list[float],
        bar: Any,
    ) -> list[list[float]]:
        """Shares of the whole model's time that one block of a group takes, by its numbers.

        Args:
            dense: A call of the whole model.
            group: Blocks of one shape.
            heads: Numbers to measure.
            units: Numbers to measure.
            empty: Share of the time that the model without blocks takes.
            seconds: Gets the whole model's times.
            bar: Progress bar.
        """
        block_ms = max(statistics.median(seconds), 1e-3) / len(self.anatomy.attentions)
        active = group[: max(1, int(1e3 * MODEL_SECONDS / block_ms))]
        whole = active == list(range(len(self.anatomy.attentions)))
        frame = self.anatomy if whole else self._frame(active)
        base = dense if whole else self._call(self._built(frame, {}))
        share = 1.0
        if not whole:
            share, times = paired(dense, base)
            seconds += times
        bar.update()
        names = [self.anatomy.attentions[index].name for index in active]
        rows = []
        for count in heads:
            row = []
            for width in units:
                if not count and not width:
                    ratio = empty / share
                elif (count, width) == (heads[-1], units[-1]):
                    ratio = 1.0
                else:
                    sizes = dict.fromkeys(names, (count, width))
                    ratio, times = paired(base, self._call(self._built(frame, sizes)))
                    seconds += times if whole else []
                row.append((ratio * share - empty) / len(active))
                bar.update()
            rows.append(row)
        return rows

    def _frame(self, active: Sequence[int]) -> Anatomy:
        """The model with only some of its blocks."""
        sites, mlps = self.anatomy.attentions, self.anatomy.mlps
        sizes = {
            sites[i].name: (len(sites[i].held), len(mlps[i].held) if mlps else 0) for i in active
        }
        every = {site.name: sizes.get(site.name, (0, 0)) for site in sites}
        model = self._cut(self.anatomy, every)
        drop_blocks(model, self.images)
        adapter = self.anatomy.adapter
        return Anatomy.of(adapter, model)

    def _cut(self, anatomy: Anatomy, sizes: Mapping[str, Counts]) -> nn.Module:
        """A copy in which the named blocks hold their first heads and units, others all."""

        def rows(sites: Sequence[Site], part: int) -> list[list[int]]:
            counts = [
                sizes[a.name][part] if a.name in sizes else len(site.held)
                for a, site in zip(anatomy.attentions, sites, strict=True)
            ]
            return [list(range(count)) for count in counts]

        if not anatomy.attentions:
            return copy.deepcopy(anatomy.model)
        mlp = rows(anatomy.mlps, 1) if anatomy.mlps else None
        return prune_heads(anatomy.model, rows(anatomy.attentions, 0), mlp=mlp)

    def _built(self, anatomy: Anatomy, sizes: Mapping[str, Counts]) -> nn.Module:
        """Such a copy, accelerated."""
        model = self._cut(anatomy, sizes)
        accelerate(model)
        return model

    def _call(self, model: nn.Module) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return model(self.images)

        return call
