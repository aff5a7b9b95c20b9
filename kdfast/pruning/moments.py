# SPDX-License-Identifier: Apache-2.0
"""Means and covariances of rows that come in pieces. T rows, D channels, O targets of a row."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROWS = 4096  # of one product in fp32: its rounding does not grow with the number of rows
PANEL = 384  # columns; of a symmetric product only the panels on and above the diagonal are taken


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
        self._shift: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds rows; ``y`` in every call or in none."""
        if len(x) == 0:
            return
        y = x.new_zeros(len(x), 0) if y is None else y
        x = wide(x)
        y = y.to(x.dtype)
        if self._shift is None:
            # Rounded to the type of the rows, in which it is subtracted.
            means = (z.double().mean(0).to(z.dtype).double() for z in (x, y))
            self._shift = next(means), next(means)
            like = self._shift[0]
            width, targets = x.shape[1], y.shape[1]
            self._x, self._y = like.new_zeros(width), like.new_zeros(targets)
            self._xx, self._yx = like.new_zeros(width, width), like.new_zeros(targets, width)
            self._yy = like.new_zeros(targets)
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

    def sum_over_processes(self) -> None:
        """Adds up the rows of all processes, where ``torch.distributed`` runs; all must call it."""
        if not _several_processes() or self._shift is None:
            return
        # Sums of rows as they are: every process has a shift of its own.
        sx, sy = self._shift
        self._xx += _outer(sx, self._x) + _outer(self._x, sx) + self.count * _outer(sx, sx)
        self._yx += _outer(sy, self._x) + _outer(self._y, sx) + self.count * _outer(sy, sx)
        self._yy += 2 * sy * self._y + self.count * sy.square()
        self._x += self.count * sx
        self._y += self.count * sy
        self._shift = torch.zeros_like(sx), torch.zeros_like(sy)
        count = torch.tensor([self.count], dtype=torch.float64, device=sx.device)
        for part in (count, self._x, self._y, self._xx, self._yx, self._yy):
            sum_over_processes(part)
        self.count = int(count)

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

    def _shifts(self) -> tuple[Tensor, Tensor]:
        if self._shift is None:
            raise ValueError("Moments: at least one row must be added, got none")
        return self._shift


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, None] * b


def sum_over_processes(tensor: Tensor) -> None:
    """Adds up a tensor over all processes, in place, where ``torch.distributed`` runs."""
    if _several_processes():
        dist.all_reduce(tensor)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized()
