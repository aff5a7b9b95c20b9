# SPDX-License-Identifier: Apache-2.0
"""Deferred shading of the synthetic scenes: one view and its labels.

Surfaces are painted from far to near as row numbers; colour, texture, fog and label of a pixel
then follow from its row and from where its ray meets that surface.
"""

from __future__ import annotations

from functools import cache, lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from kdfast.data.rng import NOISE, generator
from kdfast.data.scenes.camera import FIRST, NEAR, VIEWS, Camera, outlines, paint, quads
from kdfast.data.scenes.ground import ground_kind
from kdfast.data.scenes.layout import (
    G_MARK,
    G_OPEN,
    G_ROAD,
    GROUND_CLASS,
    SKY,
    Floats,
)
from kdfast.data.scenes.world import (
    AMP,
    AXIS,
    BANDS,
    BODY,
    COLOUR,
    FACADE,
    NORMAL,
    NOSE,
    ORIGIN,
    P0,
    P2,
    PATTERN,
    PLANE_D,
    SCALE,
    SECOND,
    SHIFT,
    TAIL,
    World,
)

_TILE = 256


@cache
def _noise() -> tuple[Floats, Floats, Floats]:
    # Tiles (_TILE * _TILE,) of smooth noise in -1..1, of white noise, and of both.
    rng = generator(NOISE, 0)
    smooth = np.zeros((_TILE, _TILE), np.float32)
    for octave in (8, 16, 32, 64, 128):
        cells = np.pad(rng.uniform(-1, 1, (octave, octave)).astype(np.float32), 2, mode="wrap")
        scale = _TILE // octave
        fine = np.asarray(cv2.resize(cells, None, fx=scale, fy=scale), np.float32)
        inner = slice(2 * scale, 2 * scale + _TILE)
        smooth += fine[inner, inner] / np.float32(octave**0.4)
    smooth /= np.abs(smooth).max()
    white = rng.standard_normal(_TILE * _TILE).astype(np.float32)
    return smooth.reshape(-1), white, smooth.reshape(-1) + 0.4 * white


@lru_cache(maxsize=4)
def _grain(size: tuple[int, int]) -> Floats:
    # White noise of at least one tile more than the picture: a random window is one draw.
    repeat = (size[0] // _TILE + 2, size[1] // _TILE + 2)
    return np.tile(_noise()[1].reshape(_TILE, _TILE), repeat)


def _sample(tile: Floats, u: Floats, v: Floats) -> Floats:
    # The shift, a multiple of the tile, makes truncation round down.
    column = (u + 2.0**15).astype(np.int32) & (_TILE - 1)
    row = (v + 2.0**15).astype(np.int32) & (_TILE - 1)
    return tile.take(row * _TILE + column)


def render(
    world: World, view: int, size: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Picture and labels of one view.

    Args:
        world: The scene.
        view: Index into ``VIEWS``.
        size: (height, width).
        rng: Draws the exposure, colour balance and noise of this camera.

    Returns:
        (height, width, 3) RGB and (height, width) class numbers.
    """
    pitch, roll = world.layout.tilt
    camera = Camera.of(view, size, pitch, roll)
    rays = camera.rays(size)
    table = _face_boards(world, camera, view)
    painted = (rays[2] < -1e-3).astype(np.uint16).reshape(size)
    paint(painted, *outlines(world, camera, table, size))
    shade = np.zeros(size, np.uint8)
    shadows, visible = quads(world.shadows, camera, size)
    paint(shade, shadows, np.ones_like(visible))

    rows = painted.reshape(-1)
    linear = np.empty((3, rows.size), np.float32)
    label = np.full(rows.size, SKY, np.uint8)
    sky = np.flatnonzero(rows == 0)
    linear[:, sky] = _shade_sky(world, rays.take(sky, 1))
    ground = np.flatnonzero(rows == 1)
    flat = rays.take(ground, 1)
    depth = -camera.place[2] / flat[2]
    at = camera.place[:2, None] + flat[:2] * depth
    colour, label[ground] = _shade_ground(world, at, depth, shade.reshape(-1).take(ground))
    linear[:, ground] = _in_haze(world, colour, depth)
    things = np.flatnonzero(rows >= FIRST)
    which = rows.take(things).astype(np.int64) - FIRST
    colour, depth = _shade_things(world, table, which, camera, rays.take(things, 1))
    linear[:, things] = _in_haze(world, colour, depth)
    label[things] = world.label.take(which)
    return _develop(linear.reshape(3, *size), world, rng), label.reshape(size)


def _face_boards(world: World, camera: Camera, view: int) -> Floats:
    # Columns first: (COLUMNS, M).
    table = world.table.T.copy()
    yaw = np.radians(VIEWS[view][1])
    rows = np.flatnonzero(world.board)
    table[NORMAL, rows] = np.array([[-np.cos(yaw)], [-np.sin(yaw)], [0]])
    table[AXIS, rows] = np.array([[np.sin(yaw)], [-np.cos(yaw)]])
    foot = table[ORIGIN, rows]
    table[PLANE_D, rows] = -np.cos(yaw) * foot[0] - np.sin(yaw) * foot[1]
    return table


def _in_haze(world: World, colour: Floats, depth: Floats) -> Floats:
    clear = np.exp(depth * -world.light.fog)
    horizon = world.light.horizon[:, None]
    colour -= horizon
    colour *= clear
    colour += horizon
    return colour


def _shade_sky(world: World, rays: Floats) -> Floats:
    light = world.light
    x, y, z = rays
    up = np.minimum(3 * np.maximum(z, 0) / np.sqrt(x * x + y * y + z * z), 1)
    high = 14 / np.maximum(z, 0.04)
    cloud = _sample(_noise()[0], x * high + 40, y * high)
    cloud = light.cloud * np.clip(1.6 * cloud + 0.3, 0, 1)
    horizon, zenith = light.horizon[:, None], light.zenith[:, None]
    return horizon + (zenith - horizon) * (up * (1 - cloud)) + 0.05 * horizon * cloud


def _shade_ground(
    world: World, at: Floats, depth: Floats, shade: NDArray[np.uint8]
) -> tuple[Floats, NDArray[np.uint8]]:
    light, road = world.light, world.layout
    smooth, white, _ = _noise()
    x, y = at
    coarse = _sample(smooth, x * 2, y * 2)
    kind = ground_kind(road, x, y, coarse)
    value = 0.12 * coarse + 0.06 * _sample(white, x * 24, y * 24)
    value *= light.texture / (1 + 0.06 * depth)
    value += 1
    if road.tiles[1]:
        period, width = (np.float32(number) for number in road.tiles)
        a, b = (x + 0.3 * y) / period, (y - 0.3 * x) / period
        joint = np.minimum(a - np.floor(a), b - np.floor(b)) < width / period
        joint &= (kind != G_MARK) & (kind != G_OPEN) & (depth < 25)
        if not road.slabs:
            joint &= kind != G_ROAD
        np.multiply(value, 0.55 if period < 2 else 1.7, out=value, where=joint)
    direct = light.sun_colour * max(float(light.sun[2]), 0.08)
    full = light.ambient + direct
    dark = np.minimum(light.ambient * 0.85 + direct * (1 - light.shadow), full)
    lit = np.concatenate([road.colours * full, road.colours * dark]).T
    return lit.take(kind + shade * len(GROUND_CLASS), 1) * value, GROUND_CLASS.take(kind)


def _shade_things(
    world: World, table: Floats, rows: NDArray[np.int64], camera: Camera, rays: Floats
) -> tuple[Floats, Floats]:
    axis, normal = table[AXIS], table[NORMAL]
    gap = table[PLANE_D] - camera.place @ normal
    start = (camera.place[:2, None] - table[ORIGIN]) * axis
    texture = np.stack([world.light.texture * table[AMP], 4 * table[SCALE], table[SHIFT]])
    at, across, (amp, scale, shift) = (
        normal.take(rows, 1),
        axis.take(rows, 1),
        texture.take(rows, 1),
    )
    slant = at[0] * rays[0] + at[1] * rays[1] + at[2] * rays[2]
    # A painted outline also covers pixels just outside of the surface, whose rays may miss it.
    depth = gap.take(rows) / np.where(np.abs(slant) < 1e-4, -1e-4, slant)
    np.clip(depth, NEAR, 400, out=depth)
    u = start.sum(0).take(rows) + depth * (rays[0] * across[0] + rays[1] * across[1])
    v = camera.place[2] + rays[2] * depth
    colour, pattern = table[COLOUR].take(rows, 1), table[PATTERN].take(rows)

    houses = np.flatnonzero(pattern == FACADE)
    if len(houses):
        chosen, tint = _windows(table, rows[houses], u[houses], v[houses])
        colour[:, houses[chosen]] = tint
    bands = np.flatnonzero((pattern == BANDS) & (v % np.float32(0.4) < 0.07))
    colour[:, bands] = table[SECOND].take(rows[bands], 1)
    cars = np.flatnonzero((pattern >= BODY) & (pattern <= TAIL))
    if len(cars):
        colour[:, cars] = _bodywork(table.take(rows[cars], 1), u[cars], v[cars])
    # On flat tops the second direction of the texture is level instead of up.
    level = at[2] * depth * (rays[1] * across[0] - rays[0] * across[1])
    grain = _sample(_noise()[2], u * scale + shift, (v + level) * scale)
    grain *= amp / (1 + 0.02 * depth)
    colour *= np.maximum(1 + grain, 0.2)
    return colour, depth


def _windows(
    table: Floats, rows: NDArray[np.int64], u: Floats, v: Floats
) -> tuple[NDArray[np.int64], Floats]:
    # Which of the pixels are window, and their colours (3, n).
    pitch, storey, fill = table[P0 : P2 + 1].take(rows, 1)
    column, floor = u / pitch, v / storey
    left, low = np.floor(column), np.floor(floor)
    glass = np.abs(column - left - 0.5) < 0.5 * fill
    chosen = np.flatnonzero(glass & (np.abs(floor - low - 0.55) < 0.45 * fill))
    flicker = _sample(_noise()[1], left[chosen] * 7, low[chosen] * 5)
    return chosen, table[SECOND].take(rows[chosen], 1) * np.clip(1 + 0.35 * flicker, 0.3, 2)


def _bodywork(p: Floats, u: Floats, v: Floats) -> Floats:
    (half, low, high), pattern, a = p[P0 : P2 + 1], p[PATTERN], np.abs(u)
    out = np.where((v > low) & (v < high) & (a < half - 0.12), p[SECOND], p[COLOUR])
    side = pattern == BODY
    wheel = side & ((a - 0.63 * half) ** 2 + (v - 0.33) ** 2 < 0.33**2)
    out[:, wheel | (v < 0.24)] = 0.022
    lamp = ~side & (a > half - 0.35) & (v > 0.55) & (v < 0.78)
    out[:, lamp & (pattern == NOSE)] = np.array([[0.95], [0.92], [0.8]])
    out[:, lamp & (pattern == TAIL)] = np.array([[0.6], [0.05], [0.04]])
    return out


def _develop(linear: Floats, world: World, rng: np.random.Generator) -> NDArray[np.uint8]:
    height, width = linear.shape[1:]
    light = world.light
    gain = rng.normal(1, 0.1) * rng.normal(1, 0.05, 3) * (1.7 if light.night else 1.0)
    dim = rng.uniform(0, 0.18)
    shift = rng.integers(_TILE, size=(3, 2)).tolist()
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    vignette = 1 - np.float32(dim) * (x * x + y * y)
    blur, noise = light.blur * max(1.0, width / 160), np.float32(255 * light.noise)
    grain = _grain((height, width))
    planes = []
    for channel, (down, right) in enumerate(shift):
        plane = cv2.GaussianBlur(linear[channel], (0, 0), blur)
        plane *= vignette
        plane *= np.float32(255**2 * gain[channel])
        np.sqrt(np.maximum(plane, 0, out=plane), out=plane)
        plane += grain[down : down + height, right : right + width] * noise
        planes.append(np.clip(plane + 0.5, 0, 255).astype(np.uint8))
    return np.asarray(cv2.merge(planes), np.uint8)
