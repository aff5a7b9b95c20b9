# SPDX-License-Identifier: Apache-2.0
"""Vehicles, people, poles, signs and traffic lights of one synthetic scene."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdfast.data.scenes.layout import PEDESTRIAN, POLE, VEHICLE, Floats, choose, pick
from kdfast.data.scenes.objects import SQUARE, clear_of_cross, hidden
from kdfast.data.scenes.world import (
    BODY,
    NOSE,
    PLAIN,
    TAIL,
    Builder,
    Finish,
    discs,
    trapezium,
)

_BODYWORK = (BODY, TAIL, BODY, NOSE, PLAIN)
# Length, width and height of cars, vans and buses.
_MODELS = np.array([(4.4, 1.82, 1.5), (5.4, 2.0, 2.4), (9.0, 2.5, 3.2)])
_METALS = (3, 3, 3, 1, 1, 0, 0, 0, 0, 2, 3)
_SIGNS = np.array([(0.7, 0.08, 0.08), (0.08, 0.2, 0.6), (0.75, 0.6, 0.1), (0.8, 0.8, 0.8)])
_BULBS = np.array([(2.5, 0.2, 0.15), (2.2, 1.3, 0.1), (0.2, 2.2, 0.6)])
_LAMP, _SIGN, _BOLLARD, _SIGNAL = range(4)


def _paint(rng: np.random.Generator, count: int) -> Floats:
    grey = np.array((0.05, 0.12, 0.25, 0.45, 0.7, 0.85))[rng.integers(0, 6, (count, 1))]
    bright = rng.random((count, 3)) ** 2 * 0.8 + 0.03
    return np.where(rng.random((count, 1)) < 0.5, grey, bright).astype(np.float32)


def vehicles(build: Builder, walls: Floats) -> None:
    """Add traffic in the lanes, parked vehicles and crossing traffic.

    Args:
        build: The scene.
        walls: (m, 4, 2) footprints of houses; vehicles behind them are left out.
    """
    rng, road = build.rng, build.layout
    busy = rng.uniform(6, 30)
    sides = np.array([-1.0, 1.0])
    lanes = (sides[:, None] * (np.arange(road.lanes) + 0.5) * road.lane).reshape(-1)
    gaps = 12.5 + rng.exponential(busy, (len(lanes), 9))
    if road.parking:
        lanes = np.concatenate([lanes, sides * (road.half - 1.1)])
        gaps = np.concatenate([gaps, 8.5 + rng.exponential(9.0, (2, 9))])
    along = (-50 + np.cumsum(gaps, 1)).reshape(-1)
    s = np.repeat(lanes, 9) + rng.normal(0, 0.15, along.size)
    turn = np.where(s > 0, np.pi, 0.0)
    free = (np.abs(s) < road.half - road.parking) | clear_of_cross(build, along, 4.0)
    x, y, angle = road.place(along[free], s[free])
    yaw = angle + turn[free]
    if road.cross and rng.random() < 0.6:
        ends = rng.uniform(-road.half - 10, road.half + 10, 2)
        cx, cy, angle = road.place(road.cross + sides * road.cross_half / 2, ends)
        x, y, yaw = (
            np.concatenate(pair) for pair in ((x, cx), (y, cy), (yaw, angle + sides * np.pi / 2))
        )
    ego = (np.abs(x) < 8.5) & (np.abs(y) < 2.2) | (np.hypot(x, y) < 2.8)
    keep = ~ego & ~hidden(x, y, walls) & (x < 75) & (x > -55)
    x, y, yaw = x[keep], y[keep], yaw[keep]
    model = choose(rng, (0.7, 0.18, 0.12), len(x))
    # A bus beside the ego vehicle would fill two views.
    model[np.hypot(x, y) < 9] = 0
    size = _MODELS[model] * rng.normal(1, 0.06, (len(x), 3))
    for chosen in (model == 0, model > 0):
        if chosen.any():
            _vehicle(build, x[chosen], y[chosen], yaw[chosen], size[chosen], model[chosen][0] == 0)


def _vehicle(build: Builder, x: Floats, y: Floats, yaw: Floats, size: Floats, car: bool) -> None:
    rng, count = build.rng, len(x)
    length, width, height = size.T
    colour = _paint(rng, count)
    glass = (np.array([0.06, 0.07, 0.09]) * rng.uniform(0.5, 2.5, (count, 1))).astype(np.float32)
    key = -np.hypot(x, y)
    top = height * 0.62 if car else height
    band = (0.0, 0.0) if car else (height * 0.45, height * 0.78)
    finish = Finish(patterns=_BODYWORK, second=glass, p=(0.0, *band))
    box = (x, y, yaw, length, width, 0.0, top)
    build.shade(build.boxes(box, VEHICLE, colour, key, finish), height)
    if not car:
        return
    # Glass cabin and painted roof in one go.
    twice = np.tile(np.stack([x, y, yaw, length, width, height, key]), 2)
    x, y, yaw, length, width, height, key = twice
    roof = np.arange(2 * count) >= count
    box = (
        x - 0.06 * length * np.cos(yaw),
        y - 0.06 * length * np.sin(yaw),
        yaw,
        length * np.where(roof, 0.46, 0.5),
        width * np.where(roof, 0.86, 0.88),
        np.where(roof, 0.95 * height, 0.62 * height),
        height * np.where(roof, 1, 0.96),
    )
    colours = np.concatenate([glass, colour])
    build.boxes(box, VEHICLE, colours, key + np.where(roof, 0.02, 0.01))


def people(build: Builder, walls: Floats) -> None:
    """Add pedestrians on the sidewalks, at the crossing and now and then on the road.

    Args:
        build: The scene.
        walls: (m, 4, 2) footprints of houses; people behind them are left out.
    """
    rng, road = build.rng, build.layout
    count = int(rng.integers(3, 18))
    x, place, where, lane = rng.uniform((-16, 0.1, 0, -1), (26, 0.9, 1, 1), (count, 4)).T
    side = rng.integers(0, 2, count)
    wide = np.maximum(np.array(road.walk)[side], 0.8)
    s = (1 - 2 * side) * (road.half + np.array(road.verge)[side] + wide * place)
    s = np.where(where < 0.12, lane * road.half, s)
    if road.cross and road.zebra:
        ahead = road.cross - np.sign(road.cross) * (road.cross_half + 3)
        walking = where > 0.7
        x, s = np.where(walking, ahead, x), np.where(walking, lane * road.half, s)
    x, y, _ = road.place(x, s)
    keep = (np.hypot(x, y) > 3.5) & ~hidden(x, y, walls)
    x, y, count = x[keep], y[keep], int(keep.sum())
    if not count:
        return
    tall, stride = rng.uniform(1.45, 1.9, count), rng.uniform(0.06, 0.15, count)
    zero = np.zeros(count)
    leg = trapezium(zero + 0.2, zero, 0.5 * tall)
    figure = np.stack(
        [
            leg,
            leg,
            trapezium(zero + 0.6, 0.45 * tall, 0.87 * tall, 0.8),
            discs(zero, 0.93 * tall, 0.12, 0.14),
        ],
        1,
    )
    figure[:, 0, :, 0] -= stride[:, None]
    figure[:, 1, :, 0] += stride[:, None]
    colour = np.empty((count, 4, 3), np.float32)
    colour[:, :2] = 0.6 * _paint(rng, count)[:, None]
    colour[:, 2] = _paint(rng, count)
    colour[:, 3] = np.array([0.55, 0.38, 0.28]) * rng.uniform(0.4, 1.3, (count, 1))
    build.boards(x, y, figure, PEDESTRIAN, colour, -np.hypot(x, y), Finish(amp=0.06))
    foot = np.stack([x, y], -1)[:, None] + 0.2 * SQUARE
    build.shade(foot, tall, top=False)


def _pole_rows(build: Builder) -> NDArray[np.floating]:
    # Rows of x, s, height, width, kind.
    rng, road = build.rng, build.layout
    parts: list[tuple[Floats, float, float, float, int]] = []
    for sign in (1.0, -1.0):
        start, step, height = rng.uniform((-40, 14, 5), (-25, 28, 9)).tolist()
        use = rng.random(2).tolist()
        if use[0] < 0.75:
            lamps = start + step * np.arange(7)
            parts.append((lamps, sign * (road.half + 0.5), height, 0.3, _LAMP))
        parts.append((rng.uniform(-20, 45, 3), sign * (road.half + 0.7), 2.6, 0.18, _SIGN))
        if use[1] < 0.25:
            row = rng.uniform(-10, 25) + 2.0 * np.arange(6)
            parts.append((row, sign * (road.half + 0.4), 0.95, 0.24, _BOLLARD))
    if road.cross and rng.random() < 0.75:
        ends = road.cross + np.array([-1, 1]) * (road.cross_half + 1.5)
        parts += [(ends, sign * (road.half + 0.8), 4.2, 0.3, _SIGNAL) for sign in (1.0, -1.0)]
    out = np.empty((sum(len(part[0]) for part in parts), 5))
    start = 0
    for part in parts:
        stop = start + len(part[0])
        out[start:stop, 0], out[start:stop, 1:] = part[0], part[1:]
        start = stop
    return out


def poles(build: Builder, walls: Floats) -> None:
    """Add street lamps, signs, bollards and traffic lights.

    Args:
        build: The scene.
        walls: (m, 4, 2) footprints of houses; poles behind them are left out.
    """
    rng, rows = build.rng, _pole_rows(build)
    x, y, angle = build.layout.place(rows[:, 0], rows[:, 1])
    keep = (np.hypot(x, y) > 2.5) & ~hidden(x, y, walls) & (x < 70)
    keep &= (rows[:, 4] == _SIGNAL) | clear_of_cross(build, rows[:, 0], -0.5)
    if not keep.any():
        return
    x, y, angle = x[keep], y[keep], angle[keep]
    s, tall, wide, kind = rows[keep, 1:].T
    metal = pick(rng, _METALS, 1)
    figure = trapezium(wide, np.zeros(len(x)), tall, 0.7)[:, None]
    key = -np.hypot(x, y)
    build.boards(x, y, figure, POLE, np.repeat(metal[None], len(x), 0), key)
    foot = np.stack([x, y], -1)[:, None] + SQUARE * wide[:, None, None] / 2
    build.shade(foot, tall, floor=False, top=False)
    # Arms reach over the road.
    place = np.stack([x, y, angle - np.sign(s) * np.pi / 2, tall, key])
    for value, furnish in ((_LAMP, _lamps), (_SIGN, _signs), (_SIGNAL, _signals)):
        chosen = kind == value
        if chosen.any():
            furnish(build, place[:, chosen], metal)


def _lamps(build: Builder, place: Floats, metal: Floats) -> None:
    x, y, yaw, tall, key = place
    size = np.full(len(x), 2.0)
    arm = (x + np.cos(yaw), y + np.sin(yaw), yaw, size, 0.18 * size, tall - 0.25, tall)
    build.boxes(arm, POLE, np.repeat(metal, len(x), 0), key + 0.01)


def _signs(build: Builder, place: Floats, metal: Floats) -> None:
    x, y, _, _, key = place
    rng, zero = build.rng, np.zeros((len(x), 1))
    if rng.random() < 0.5:
        plate = discs(zero, 2.4, 0.45, 0.45)
    else:
        plate = trapezium(zero + 0.8, 1.9, 2.8)
    colour = _SIGNS[rng.integers(0, 4, (len(x), 1))]
    build.boards(x, y, plate, POLE, colour, key + 0.01)


def _signals(build: Builder, place: Floats, metal: Floats) -> None:
    x, y, yaw, _, key = place
    rng, count = build.rng, len(x)
    reach = np.full(count, rng.uniform(2.5, 5))
    along, aside = reach * np.cos(yaw), reach * np.sin(yaw)
    arm = (x + along / 2, y + aside / 2, yaw, reach, np.full(count, 0.14), 4.05, 4.25)
    build.boxes(arm, POLE, np.repeat(metal, count, 0), key + 0.01)
    colour = np.empty((2 * count, 2, 3), np.float32)
    colour[:, 0], colour[:, 1] = 0.06, _BULBS[rng.integers(0, 3)]
    high = np.repeat((3.2, 4.3), count)
    zero = np.zeros(2 * count)
    figure = np.stack(
        [trapezium(zero + 0.42, high - 0.95, high), discs(zero, high - 0.25, 0.15, 0.15)], 1
    )
    x, y = np.concatenate([x, x + along]), np.concatenate([y, y + aside])
    build.boards(x, y, figure, POLE, colour, np.concatenate([key, key]) + 0.02, Finish(amp=0.01))
