# SPDX-License-Identifier: Apache-2.0
"""Objects of one synthetic scene as painted surfaces, sorted from far to near."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdfast.data.scenes.layout import Floats, Layout, Light

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
        layout: Geometry and materials of the road.
        light: Sun, sky and camera response.
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
    """Texture and patterns of surfaces.

    Attributes:
        amp: Strength of the texture.
        scale: Cells of the texture per metre.
        patterns: Patterns of the left, back, right, front and top of a box.
        second: (n, 3) or one colour for glass, windows or bands.
        p: Parameters of the patterns, (n,) each; a first of 0 is half the length of the face.
    """

    amp: float = 0.02
    scale: float = 3.0
    patterns: tuple[int, int, int, int, int] = (PLAIN,) * 5
    second: ArrayLike = (0.05, 0.05, 0.06)
    p: tuple[ArrayLike, ArrayLike, ArrayLike] = (0.0, 0.0, 0.0)


_PLAIN_FINISH = Finish()
# Columns of the boxes a builder collects.
_X, _Y, _YAW, _LENGTH, _WIDTH, _BOTTOM, _TOP, _KEY, _LABEL, _AMP, _SCALE = range(11)
_COLOUR, _SECOND, _P, _PATTERNS = slice(11, 14), slice(14, 17), slice(17, 20), slice(20, 25)


class Builder:
    """Collects boxes, boards and shadows of a scene; they become surfaces all at once."""

    def __init__(self, rng: np.random.Generator, layout: Layout, light: Light) -> None:
        """Start without surfaces."""
        self.rng, self.layout, self.light = rng, layout, light
        self._parts: list[tuple[NDArray[np.generic], ...]] = []
        self._boxes: list[Floats] = []
        self._shadows: list[Floats] = []
        self._casting: list[tuple[Floats, Floats]] = []
        self.reach = -light.sun[:2] / max(float(light.sun[2]), 0.2)

    def boxes(
        self,
        shape: tuple[ArrayLike, ...],
        label: int,
        colour: Floats,
        key: Floats,
        finish: Finish = _PLAIN_FINISH,
    ) -> Floats:
        """Add n upright boxes.

        Args:
            shape: Centre x and y, direction of the length, length, width, bottom and top; (n,)
                each or one number for all.
            label: Class.
            colour: (n, 3) reflectance.
            key: (n,) painting order, later is nearer.
            finish: Texture and patterns.

        Returns:
            (n, 4, 2) footprints.
        """
        rows = np.empty((len(key), 25))
        for column, value in enumerate((*shape, key, label, finish.amp, finish.scale)):
            rows[:, column] = value
        rows[:, _COLOUR], rows[:, _SECOND] = colour, finish.second
        rows[:, 17], rows[:, 18], rows[:, 19] = finish.p
        rows[:, _PATTERNS] = finish.patterns
        self._boxes.append(rows)
        return _footprints(rows)

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
        corners[..., 0], corners[..., 1] = x[:, None, None], y[:, None, None]
        table = np.zeros((count, parts, COLUMNS), np.float32)
        # Lit as if half turned to the sun: there is no one normal.
        table[..., COLOUR] = colour * (0.6 * self.light.sun_colour + self.light.ambient)
        table[..., ORIGIN] = corners[:, :, 0, :2]
        table[..., AMP], table[..., SCALE] = finish.amp, finish.scale
        self._append(corners, figure, table, np.full(count, label), key)

    def shade(self, foot: Floats, height: Floats, *, floor: bool = True, top: bool = True) -> None:
        """Add the shadows of n upright boxes.

        Args:
            foot: (n, 4, 2) footprints.
            height: (n,) heights.
            floor: Darken the footprint as well.
            top: Darken the shadow of the top; without it only of an upright middle plane.
        """
        self._casting.append((foot, height))
        if floor:
            self._shadows.append(foot)
        if top:
            self._shadows.append(foot + (height[:, None] * self.reach)[:, None])

    def patch(self, ground: Floats) -> None:
        """Darken quads (n, 4, 2) on the ground."""
        self._shadows.append(ground)

    def world(self) -> World:
        """Sort the surfaces from far to near."""
        self._raise_boxes()
        corners, figure, board, table, label, key = (
            np.concatenate(part) for part in zip(*self._parts, strict=True)
        )
        table[:, SHIFT] = self.rng.random(len(table)) * 97
        order = np.argsort(key, kind="stable")
        flat = np.concatenate([*self._shadows, self._swept()])
        shadows = np.zeros((*flat.shape[:2], 3), np.float32)
        shadows[..., :2] = flat
        return World(
            self.layout,
            self.light,
            corners[order],
            board[order],
            figure[order],
            table[order],
            label[order],
            shadows,
        )

    def _swept(self) -> Floats:
        # The diagonal of a footprint that is widest as seen along the shadow sweeps all of it.
        foot, height = (np.concatenate(part) for part in zip(*self._casting, strict=True))
        across = np.abs((foot[:, :2] - foot[:, 2:]) @ (self.reach[::-1] * (-1, 1)))
        first, row = np.argmax(across, 1), np.arange(len(foot))
        a, b = foot[row, first], foot[row, first + 2]
        step = height[:, None] * self.reach
        return np.stack([a, b, b + step, a + step], 1)

    def _raise_boxes(self) -> None:
        rows = np.concatenate(self._boxes)
        count, foot = len(rows), _footprints(rows)
        corners = np.empty((count, 5, 4, 3), np.float32)
        corners[:, :4, 0, :2] = corners[:, :4, 3, :2] = corners[:, 4, :, :2] = foot
        corners[:, :4, 1, :2] = corners[:, :4, 2, :2] = foot[:, _NEXT]
        corners[:, :4, :2, 2] = rows[:, _BOTTOM, None, None]
        corners[:, :4, 2:, 2] = rows[:, _TOP, None, None]
        corners[:, 4, :, 2] = rows[:, _TOP, None]
        ahead = np.stack([np.cos(rows[:, _YAW]), np.sin(rows[:, _YAW])], -1)
        left = ahead[:, ::-1] * (-1, 1)
        table = np.zeros((count, 5, COLUMNS), np.float32)
        normal = table[..., NORMAL]
        table[:, 0, AXIS] = normal[:, 1, :2] = -ahead
        table[:, 1, AXIS] = normal[:, 2, :2] = -left
        table[:, 2, AXIS] = table[:, 4, AXIS] = normal[:, 3, :2] = ahead
        table[:, 3, AXIS] = normal[:, 0, :2] = left
        normal[:, 4, 2] = 1
        lit = np.maximum(normal @ self.light.sun, 0)[..., None] * self.light.sun_colour
        lit += self.light.ambient
        table[..., COLOUR] = rows[:, None, _COLOUR] * lit
        table[..., SECOND] = rows[:, None, _SECOND] * lit
        middle = corners.mean(2)
        table[..., ORIGIN] = middle[..., :2]
        table[..., PLANE_D] = (normal * middle).sum(-1)
        table[..., PATTERN] = rows[:, _PATTERNS]
        table[..., P0 : P2 + 1] = rows[:, None, _P]
        half = rows[:, [_LENGTH, _WIDTH, _LENGTH, _WIDTH, _LENGTH]] / 2
        table[..., P0] = np.where(rows[:, 17:18] == 0, half, rows[:, 17:18])
        table[..., AMP], table[..., SCALE] = rows[:, [_AMP]], rows[:, [_SCALE]]
        self._append(corners, None, table, rows[:, _LABEL], rows[:, _KEY])

    def _append(
        self,
        corners: Floats,
        figure: Floats | None,
        table: Floats,
        label: NDArray[np.generic],
        key: Floats,
    ) -> None:
        count, parts = table.shape[:2]
        total = count * parts
        outline = np.zeros((total, CORNERS, 2), np.float32)
        if figure is not None:
            outline[:] = figure.reshape(total, CORNERS, 2)
        self._parts.append(
            (
                corners.reshape(total, 4, 3),
                outline,
                np.full(total, figure is not None),
                table.reshape(total, COLUMNS),
                np.repeat(label.astype(np.uint8), parts),
                (key[:, None] + 1e-3 * np.arange(parts)).reshape(total),
            )
        )


def _footprints(rows: Floats) -> Floats:
    long, wide = rows[:, [_LENGTH]] / 2 * _AHEAD, rows[:, [_WIDTH]] / 2 * _LEFT
    cos, sin = np.cos(rows[:, [_YAW]]), np.sin(rows[:, [_YAW]])
    foot = np.empty((len(rows), 4, 2))
    foot[..., 0] = rows[:, [_X]] + cos * long - sin * wide
    foot[..., 1] = rows[:, [_Y]] + sin * long + cos * wide
    return foot


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
