# SPDX-License-Identifier: Apache-2.0
"""A figure of images and maps in equal panels. (h, w) grid of patches, (Y, X) pixels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.machine.files import replacing
from kdfast.pictures.capture import Attentions

COLORS, CHANGE = "inferno", "RdBu_r"
# Opacity of an overlay where attention is highest; elsewhere it follows the value.
OPACITY = 0.8
DPI = 130
SIDE = 2.5  # inches of a large panel
GAP, HEAD, LINE, BAR, BAR_WIDTH = 0.08, 0.42, 0.22, 0.75, 0.12  # inches
TITLE_LINE = 0.15  # inches that every further line of a title takes
TITLE_LETTER = 0.068  # inches of a letter of it, on average


def picture(seen: Attentions, image: int) -> np.ndarray:
    """The image (Y, X, 3) in [0, 1]; without its crop each channel stretched to its own range."""
    if seen.crop is not None:
        return seen.crop[image].detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    pixels = seen.images[image].detach().float().cpu()
    if pixels.shape[0] != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1)
    flat = pixels.flatten(1)
    low, high = (
        torch.quantile(flat[:, :: max(1, flat.shape[1] // 10**6)], p, dim=1) for p in (0.002, 0.998)
    )
    span = (high - low).clamp_min(1e-6)
    stretched = (pixels - low[:, None, None]) / span[:, None, None]
    return stretched.clamp(0, 1).permute(1, 2, 0).numpy()


class Page:
    """A figure of equal panels with a title, a subtitle and colour bars, placed by hand.

    A layout engine would take longer than the drawing.
    """

    def __init__(
        self,
        lines: int,
        columns: int,
        side: float,
        grid: tuple[int, int],
        title: str,
        bars: Sequence[int] = (),
    ) -> None:
        """Place panels of a width, and room for colour bars right of some columns and the last."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.grid = grid
        self.height = side * grid[0] / grid[1]
        self.bars = sorted({*bars, columns - 1})
        lefts = [
            GAP + at * (side + GAP) + BAR * sum(bar < at for bar in self.bars)
            for at in range(columns)
        ]
        self.width = lefts[-1] + side + GAP + BAR
        self.title = self._folded(title)
        self.head = HEAD + TITLE_LINE * self.title.count("\n")
        self.tall = self.head + lines * (self.height + LINE) + GAP
        self.figure = Figure(figsize=(self.width, self.tall))
        FigureCanvasAgg(self.figure)
        self.panels = []
        for at in range(lines * columns):
            line, column = divmod(at, columns)
            bottom = self.tall - self.head - (line + 1) * (self.height + LINE)
            self.panels.append(self._axes(lefts[column], bottom, side, self.height))
            self.panels[-1].set_axis_off()
        self.rights = [lefts[column] + side + GAP for column in self.bars]

    def _axes(self, left: float, bottom: float, width: float, height: float) -> Any:
        """Axes at a place in inches."""
        return self.figure.add_axes(
            (left / self.width, bottom / self.tall, width / self.width, height / self.tall)
        )

    def _folded(self, text: str) -> str:
        """A title in lines that fit beside the colour bar."""
        room = max(1, int((self.width - BAR) / TITLE_LETTER))
        lines = (textwrap.wrap(line, room, break_on_hyphens=False) for line in text.splitlines())
        return "\n".join(piece for line in lines for piece in line)

    def subtitle(self, text: str) -> None:
        """The line under the title, which says what is shown."""
        lines = (self.title, text) if self.title else (text,)
        middle = (self.width - BAR) / 2 / self.width
        top = 1 - GAP / self.tall
        self.figure.suptitle("\n".join(lines), fontsize=9, x=middle, y=top, va="top")

    def image(self, at: int, seen: Attentions, image: int, token: int | None) -> None:
        """The image itself; a patch that looks is marked."""
        panel, pixels = self.panels[at], picture(seen, image)
        panel.imshow(pixels)
        panel.set_title("image", fontsize=7.5)
        if token is not None and token >= seen.prefix:
            from matplotlib.patches import Rectangle

            y, x = divmod(token - seen.prefix, seen.grid[1])
            sides = pixels.shape[0] / seen.grid[0], pixels.shape[1] / seen.grid[1]
            corner = (x * sides[1] - 0.5, y * sides[0] - 0.5)
            panel.add_patch(
                Rectangle(corner, sides[1], sides[0], fill=False, edgecolor="cyan", linewidth=1.5)
            )

    def map(
        self,
        at: int,
        values: np.ndarray,
        top: float,
        title: str,
        *,
        overlay: tuple[Attentions, int] | None = None,
        signed: bool = False,
    ) -> Any:
        """A map (h, w), alone as patches, or smooth over its image and as opaque as it is high."""
        panel = self.panels[at]
        panel.set_title(title, fontsize=7.5)
        colors: dict[str, Any] = {
            "cmap": CHANGE if signed else COLORS,
            "vmin": -top if signed else 0.0,
            "vmax": top,
        }
        if overlay is None:
            return panel.imshow(values, interpolation="nearest", **colors)
        pixels = picture(*overlay)
        extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
        panel.imshow(pixels, extent=extent)
        alpha = OPACITY * np.clip(np.abs(values) / top, 0, 1)
        return panel.imshow(values, interpolation="bicubic", alpha=alpha, extent=extent, **colors)

    def empty(self, at: int, text: str) -> None:
        """A panel that says why nothing is there."""
        from matplotlib.patches import Rectangle

        panel = self.panels[at]
        panel.set_xlim(-0.5, self.grid[1] - 0.5)
        panel.set_ylim(self.grid[0] - 0.5, -0.5)
        panel.set_aspect("equal")
        corner = (-0.5, -0.5)
        panel.add_patch(
            Rectangle(corner, self.grid[1], self.grid[0], facecolor="0.93", edgecolor="0.75")
        )
        middle = ((self.grid[1] - 1) / 2, (self.grid[0] - 1) / 2)
        panel.text(*middle, text, ha="center", va="center", fontsize=7, color="0.4")

    def bar(self, drawn: Any, label: str, *, which: int = -1, ends: str = "max") -> None:
        """The colour bar of ``drawn`` in one of the places for bars."""
        height = min(self.tall - self.head - LINE - GAP, 2 * SIDE)
        axes = self._axes(
            self.rights[which], self.tall - self.head - LINE - height, BAR_WIDTH, height
        )
        bar = self.figure.colorbar(drawn, cax=axes, extend=ends, extendfrac=0.03)
        bar.set_label(label, fontsize=7.5)
        bar.ax.tick_params(labelsize=7)
        if bar.solids is not None:
            # One number: that of an overlay is one for each of its patches.
            bar.solids.set_alpha(1.0)

    def save(self, path: str | Path) -> Path:
        """Write the PNG."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            self.figure.savefig(partial, dpi=DPI, format=path.suffix[1:] or "png")
        return path
