# SPDX-License-Identifier: Apache-2.0
"""Objects of one synthetic scene as painted surfaces, sorted from far to near."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdfast.data.scene_layout import Floats, Layout, Light

# Surface patterns.
PLAIN, FACADE, BODY, NOSE, TAIL, BANDS = range(6)
# Columns of World.table.
COLOUR, SECOND = slice(0, 3), slice(3, 6)
AMP, SCALE, SHIFT, PATTERN, P0, P1, P2 = range(6, 13)
NORMAL, PLANE_D = slice(13, 16), 16
AXIS, ORIGIN = slice(17, 19), slice(19, 21)
COLUMNS = 21

CORNERS = 12
_TURN = 2 * np.pi * np.arange(CORNERS) / CORNERS
_DISC = np.stack([np.cos(_TURN), np.sin(_TURN)], -1).astype(np.float32)
# Footprint corners as parts of half the length and half the width.
_AHEAD = np.array([1, -1, -1, 1], np.float32)
_LEFT = np.array([1, 1, -1, -1], np.float32)
_NEXT = [1, 2, 3, 0]


@dataclass(frozen=True)
class World:
    """One scene.

    Surfaces are rows. A row is a quad in space or, with ``board`` set, a figure that always turns
    to the camera: outline points (across, up) from a foot point on the ground.

    Attributes:
        layout: Road.
        light: Light.
        corners: (M, 4, 3) quads; of boards only the first corner counts, the foot point.
        board: (M,) whether the row is a board.
        figure: (M, CORNERS, 2) outlines of the boards.
        table: (M, COLUMNS) how the surface is shaded; boards get their plane from the camera.
        label: (M,) class.
        shadows: (S, 4, 3) quads on the ground.
    """

    layout: Layout
    light: Light
    corners: Floats
    board: NDArray[np.bool_]
    figure: Floats
    table: Floats
    label: NDArray[np.uint8]
    shadows: Floats


@dataclass(frozen=True)
class Finish:
    """How surfaces look beside their colour.

    Attributes:
        amp: Strength of the texture.
        scale: Cells of the texture per metre.
        patterns: Patterns of the left, back, right, front and top of a box.
        second: (n, 3) or one colour for glass, windows or bands.
        p: Parameters of the patterns, (n,) each; the first is half the length of a face if None.
    """

    amp: float = 0.02
    scale: float = 3.0
    patterns: tuple[int, int, int, int, int] = (PLAIN,) * 5
    second: ArrayLike = (0.05, 0.05, 0.06)
    p: tuple[Floats | None, Floats | float, Floats | float] = (None, 0.0, 0.0)


_PLAIN_FINISH = Finish()


@dataclass(frozen=True)
class Boxes:
    """n upright boxes: centre, direction of the length, sides, bottom and top, (n,) each."""

    x: Floats
    y: Floats
    yaw: Floats
    length: Floats
    width: Floats
    bottom: Floats | float
    top: Floats | float


class Builder:
    """Collects surfaces and shadows of a scene."""

    def __init__(self, rng: np.random.Generator, layout: Layout, light: Light) -> None:
        """Start without surfaces."""
        self.rng, self.layout, self.light = rng, layout, light
        self._parts: list[tuple[NDArray[np.floating], ...]] = []
        self._shadows: list[Floats] = []
        sun = light.sun
        self._reach = -sun[:2] / max(float(sun[2]), 0.2)

    def boxes(
        self, box: Boxes, label: int, colour: Floats, key: Floats, finish: Finish = _PLAIN_FINISH
    ) -> Floats:
        """Add n boxes.

        Args:
            box: The boxes.
            label: Class.
            colour: (n, 3) reflectance.
            key: (n,) painting order, later is nearer.
            finish: Texture and patterns.

        Returns:
            (n, 4, 2) footprints.
        """
        count, light = len(box.x), self.light
        ahead = np.stack([np.cos(box.yaw), np.sin(box.yaw)], -1)
        left = ahead[:, ::-1] * (-1, 1)
        long, wide = box.length / 2, box.width / 2
        foot = (
            np.stack([box.x, box.y], -1)[:, None]
            + (ahead * long[:, None])[:, None] * _AHEAD[:, None]
            + (left * wide[:, None])[:, None] * _LEFT[:, None]
        )
        corners = np.empty((count, 5, 4, 3), np.float32)
        corners[:, :4, 0, :2] = corners[:, :4, 3, :2] = corners[:, 4, :, :2] = foot
        corners[:, :4, 1, :2] = corners[:, :4, 2, :2] = foot[:, _NEXT]
        corners[:, :4, :2, 2] = np.reshape(box.bottom, (-1, 1, 1))
        corners[:, :4, 2:, 2] = np.reshape(box.top, (-1, 1, 1))
        corners[:, 4, :, 2] = np.reshape(box.top, (-1, 1))
        table = np.zeros((count, 5, COLUMNS), np.float32)
        table[:, 0, NORMAL][:, :2], table[:, 0, AXIS] = left, -ahead
        table[:, 1, NORMAL][:, :2], table[:, 1, AXIS] = -ahead, -left
        table[:, 2, NORMAL][:, :2], table[:, 2, AXIS] = -left, ahead
        table[:, 3, NORMAL][:, :2], table[:, 3, AXIS] = ahead, left
        table[:, 4, NORMAL], table[:, 4, AXIS] = (0, 0, 1), ahead
        lit = np.maximum(table[..., NORMAL] @ light.sun, 0)[..., None] * light.sun_colour
        lit += light.ambient
        table[..., COLOUR] = colour[:, None] * lit
        table[..., SECOND] = np.reshape(np.asarray(finish.second), (-1, 1, 3)) * lit
        middle = corners.mean(2)
        table[..., ORIGIN] = middle[..., :2]
        table[..., PLANE_D] = (table[..., NORMAL] * middle).sum(-1)
        table[..., PATTERN] = finish.patterns
        first, table[..., P1], table[..., P2] = finish.p[0], *map(_column, finish.p[1:])
        table[..., P0] = (
            np.stack([long, wide, long, wide, long], -1) if first is None else (_column(first))
        )
        self._append(corners, None, table, label, key, finish)
        return foot.astype(np.float32)

    def boards(
        self,
        x: Floats,
        y: Floats,
        figure: Floats,
        label: int,
        colour: Floats,
        key: Floats,
        finish: Finish = _PLAIN_FINISH,
    ) -> None:
        """Add n figures of p parts, later parts in front.

        Args:
            x: (n,) foot.
            y: (n,) foot.
            figure: (n, p, CORNERS, 2) outlines in metres across and up.
            label: Class.
            colour: (n, p, 3) reflectance.
            key: (n,) painting order, later is nearer.
            finish: Texture; patterns do not apply.
        """
        count, parts = figure.shape[:2]
        corners = np.zeros((count, parts, 4, 3), np.float32)
        corners[..., 0] = x[:, None, None]
        corners[..., 1] = y[:, None, None]
        table = np.zeros((count, parts, COLUMNS), np.float32)
        # Lit as if half turned to the sun: there is no one normal.
        table[..., COLOUR] = colour * (0.6 * self.light.sun_colour + self.light.ambient)
        table[..., ORIGIN] = corners[:, :, 0, :2]
        self._append(corners, figure, table, label, key, finish)

    def shade(self, foot: Floats, height: Floats, *, floor: bool = True, top: bool = True) -> None:
        """Add the shadows of n upright boxes.

        Args:
            foot: (n, 4, 2) footprints.
            height: (n,) heights.
            floor: Darken the footprint as well.
            top: Darken the shadow of the top; without it only of an upright middle plane.
        """
        step = height[:, None] * self._reach
        tip = foot + step[:, None]
        # The widest diagonal as seen along the shadow sweeps the rest of it.
        across = np.abs((foot[:, :2] - foot[:, 2:]) @ (self._reach[::-1] * (-1, 1)))
        first = np.argmax(across, 1)
        row = np.arange(len(foot))
        a, b = foot[row, first], foot[row, first + 2]
        quads = [np.stack([a, b, b + step, a + step], 1)]
        quads += [tip] * top + [foot] * floor
        self._shadows += quads

    def patch(self, ground: Floats) -> None:
        """Darken quads (n, 4, 2) on the ground."""
        self._shadows.append(ground)

    def world(self) -> World:
        """Sort the surfaces from far to near."""
        corners, figure, board, table, label, key = (
            np.concatenate(part) for part in zip(*self._parts, strict=True)
        )
        order = np.argsort(key, kind="stable")
        flat = np.concatenate(self._shadows)
        shadows = np.zeros((*flat.shape[:2], 3), np.float32)
        shadows[..., :2] = flat
        return World(
            self.layout,
            self.light,
            corners[order],
            board[order].astype(bool),
            figure[order],
            table[order],
            label[order].astype(np.uint8),
            shadows,
        )

    def _append(
        self,
        corners: Floats,
        figure: Floats | None,
        table: Floats,
        label: int,
        key: Floats,
        finish: Finish,
    ) -> None:
        count, parts = table.shape[:2]
        total = count * parts
        table[..., AMP], table[..., SCALE] = finish.amp, finish.scale
        table[..., SHIFT] = self.rng.random((count, parts)) * 97
        outline = np.zeros((total, CORNERS, 2), np.float32)
        if figure is not None:
            outline[:] = figure.reshape(total, CORNERS, 2)
        order = key[:, None] + 1e-3 * np.arange(parts)
        self._parts.append(
            (
                corners.reshape(total, 4, 3),
                outline,
                np.full(total, figure is not None, np.uint8),
                table.reshape(total, COLUMNS),
                np.full(total, label, np.uint8),
                order.reshape(total),
            )
        )


def _column(value: Floats | float) -> NDArray[np.floating]:
    return np.reshape(np.asarray(value), (-1, 1))


def trapezium(width: Floats, low: ArrayLike, high: ArrayLike, taper: ArrayLike = 1.0) -> Floats:
    """Outlines (..., CORNERS, 2) of upright figures that narrow by ``taper`` towards the top."""
    half, low, high = np.broadcast_arrays(np.asarray(width) / 2, low, high)
    out = np.empty((*half.shape, CORNERS, 2), np.float32)
    top = half * taper
    out[..., 0, 0], out[..., 1, 0] = -half, half
    out[..., :2, 1] = low[..., None]
    out[..., 2, 0], out[..., 3:, 0] = top, -top[..., None]
    out[..., 2:, 1] = high[..., None]
    return out


def discs(across: ArrayLike, up: ArrayLike, wide: ArrayLike, tall: ArrayLike) -> Floats:
    """Outlines (..., CORNERS, 2) of ellipses around (across, up)."""
    x, y, a, b = np.broadcast_arrays(across, up, wide, tall)
    out = np.empty((*x.shape, CORNERS, 2), np.float32)
    out[..., 0] = x[..., None] + a[..., None] * _DISC[:, 0]
    out[..., 1] = y[..., None] + b[..., None] * _DISC[:, 1]
    return out
