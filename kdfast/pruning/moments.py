# SPDX-License-Identifier: Apache-2.0
"""Means and covariances of rows that come in pieces. T rows, D channels, O targets of a row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.machine.ranks import Ranks

ROWS = 4096  # of one product in fp32: its rounding does not grow with the number of rows
PANEL = 384  # columns; of a symmetric product only the panels on and above the diagonal are taken

# What is subtracted from rows (D,) and targets (O,), fp64.
Shift = tuple[Tensor, Tensor]


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Context in which fp32 products are fp32, whatever autocast and torch's precision say."""
    holders: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [holder.fp32_precision for holder in holders]
    try:
        for holder in holders:
            holder.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.fp32_precision = value


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


class Moments:
    """Mean and covariance of rows x (T, D), and their covariance with targets y (T, O).

    Rows are shifted by the mean of the first piece, so that a large mean costs no digits. Products
    of ``ROWS`` rows are in fp32 (fp64 for fp64 rows), all sums in fp64: D^2 + D * O numbers.

    Attributes:
        count: T, the rows so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: Shift | None = None

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds rows; ``y`` in every call or in none."""
        if len(x) == 0:
            return
        y = x.new_zeros(len(x), 0) if y is None else y
        x = wide(x)
        y = y.to(x.dtype)
        if self._shift is None:
            self.start(Moments.shift_of(x, y))
            assert self._shift is not None
        x, y = (z - shift.to(z) for z, shift in zip((x, y), self._shift, strict=True))
        with exact_products(x.device):
            for a, b in zip(x.split(ROWS), y.split(ROWS), strict=True):
                self._x += a.double().sum(0)
                self._y += b.double().sum(0)
                self._yy += b.double().square().sum(0)
                self._yx += b.T @ a
                # Mirrored at the end.
                for start in range(0, a.shape[1], PANEL):
                    panel = a[:, start : start + PANEL]
                    self._xx[start : start + PANEL, start:] += panel.T @ a[:, start:]
        self.count += len(x)

    @staticmethod
    def shift_of(x: Tensor, y: Tensor) -> Shift:
        """Means of rows, both in fp32 or fp64, rounded to that type: in it they are subtracted."""
        means = [z.double().mean(0).to(z.dtype).double() for z in (x, y)]
        return means[0], means[1]

    @property
    def shift(self) -> Shift | None:
        """What is subtracted from rows and targets, on the CPU; None before the first row."""
        return None if self._shift is None else (self._shift[0].cpu(), self._shift[1].cpu())

    def start(self, shift: Shift) -> None:
        """Set up for rows from which ``shift`` is subtracted; there must be none yet."""
        sx, sy = self._shift = shift
        self._x, self._y = torch.zeros_like(sx), torch.zeros_like(sy)
        self._xx, self._yx = sx.new_zeros(len(sx), len(sx)), sx.new_zeros(len(sy), len(sx))
        self._yy = torch.zeros_like(sy)

    def sum_over_processes(self, ranks: Ranks, device: torch.device) -> None:
        """Adds up the rows of all processes, of which some may have none; all must call it.

        Args:
            ranks: This process among all.
            device: Where the rows of this process are, or would be.
        """
        if ranks.world == 1:
            return
        shifts = [shift for shift in ranks.shared(lambda: self.shift) if shift is not None]
        if not shifts:
            return
        common = shifts[0][0].to(device), shifts[0][1].to(device)
        if self._shift is None:
            self.start(common)
        self._move_to(common)
        count = torch.tensor([self.count], dtype=torch.float64, device=device)
        for part in (count, self._x, self._y, self._xx, self._yx, self._yy):
            dist.all_reduce(part)
        self.count = int(count)

    def _move_to(self, shift: Shift) -> None:
        """Makes the sums those of rows from which another shift is subtracted."""
        # Nothing where it is the same: even sums of zeros could round.
        if all(torch.equal(a, b) for a, b in zip(self._shifts(), shift, strict=True)):
            return
        sx, sy = (a - b for a, b in zip(self._shifts(), shift, strict=True))
        self._xx += _outer(sx, self._x) + _outer(self._x, sx) + self.count * _outer(sx, sx)
        self._yx += _outer(sy, self._x) + _outer(self._y, sx) + self.count * _outer(sy, sx)
        self._yy += 2 * sy * self._y + self.count * sy.square()
        self._x += self.count * sx
        self._y += self.count * sy
        self._shift = shift

    def mean(self) -> Tensor:
        """(D,) fp64."""
        return self._shifts()[0] + self._x / self.count

    def covariance(self) -> Tensor:
        """(D, D) fp64, the mean of the products, not of T - 1 of them."""
        full = self._xx / self.count
        edges = [*range(0, len(full), PANEL), len(full)]
        for start, end in pairwise(edges):
            square = full[start:end, start:end]
            square.copy_((square + square.T) / 2)
            full[end:, start:end] = full[start:end, end:].T
        mean = self._x / self.count
        return full.sub_(_outer(mean, mean))

    def target_mean(self) -> Tensor:
        """(O,) fp64."""
        return self._shifts()[1] + self._y / self.count

    def cross(self) -> Tensor:
        """(O, D) fp64, the covariance of targets and rows."""
        return self._yx / self.count - _outer(self._y / self.count, self._x / self.count)

    def target_variance(self) -> Tensor:
        """(O,) fp64."""
        return (self._yy / self.count - (self._y / self.count).square()).clamp_min(0)

    def finite(self) -> bool:
        """Whether all rows so far were finite."""
        return bool(torch.isfinite(self._x).all() and torch.isfinite(self._y).all())

    def _shifts(self) -> Shift:
        if self._shift is None:
            raise ValueError("Moments: at least one row must be added, got none")
        return self._shift


def lead_moments(ranks: Ranks, sums: Sequence[Moments], device: torch.device) -> None:
    """Starts those without a row in all processes with what the first process subtracts."""
    shifts = ranks.by_main(lambda: [moments.shift for moments in sums])
    for moments, shift in zip(sums, shifts, strict=True):
        if shift is not None and moments.shift is None:
            moments.start((shift[0].to(device), shift[1].to(device)))


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, None] * b
