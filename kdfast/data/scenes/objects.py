# SPDX-License-Identifier: Apache-2.0
"""Houses, fences and plants of one synthetic scene."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdfast.data.scenes.layout import BUILDING, VEGETATION, WALL_ODDS, Floats, pick
from kdfast.data.scenes.world import BANDS, FACADE, PLAIN, Builder, Finish, discs, trapezium

# Painting layers: what stands in the corridor of the road hides the fences behind it, and these
# the houses, whatever the distance of a long wall's middle.
HOUSES, FENCES = -2e4, -1e4
SQUARE = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)], np.float32)
_LEAVES = Finish(amp=0.38, scale=4.0)


def hidden(x: Floats, y: Floats, walls: Floats) -> NDArray[np.bool_]:
    """Whether a house stands between the ego vehicle and each point.

    Args:
        x: (n,).
        y: (n,).
        walls: (m, 4, 2) footprints of houses.

    Returns:
        (n,).
    """
    a = walls.reshape(-1, 2)
    edge = walls[:, [1, 2, 3, 0]].reshape(-1, 2) - a
    px, py = x[:, None], y[:, None]
    # Signed areas: the edge's ends on two sides of the sight line, the sight line's ends on two
    # sides of the edge.
    start = px * a[:, 1] - py * a[:, 0]
    stop = start + px * edge[:, 1] - py * edge[:, 0]
    here = edge[:, 0] * a[:, 1] - edge[:, 1] * a[:, 0]
    there = here - edge[:, 0] * py + edge[:, 1] * px
    return np.asarray(((start * stop < 0) & (here * there < 0)).any(1))


def clear_of_cross(build: Builder, x: Floats, margin: Floats | float) -> NDArray[np.bool_]:
    """Whether places x along the road keep a margin from the crossing road and its sidewalk."""
    road = build.layout
    if road.cross == 0:
        return np.ones(len(x), bool)
    return np.abs(x - road.cross) > road.cross_half + max(road.walk) + margin


def _sides(build: Builder, index: int) -> tuple[float, float, float]:
    # Sign of s, outer edge of the sidewalk, house front.
    road = build.layout
    edge = road.half + road.verge[index] + road.walk[index]
    return (1.0, -1.0)[index], edge, edge + road.front[index]


def houses(build: Builder) -> Floats:
    """Add houses and a skyline; returns the footprints (n, 4, 2) that hide what is behind."""
    rng, road = build.rng, build.layout
    rows = []
    for index in (0, 1):
        sign, _, front = _sides(build, index)
        length, gap, depth, height = rng.uniform((7, -14, 7, 4), (24, 14, 14, 9), (12, 4)).T
        gap = np.where(gap > 2, gap, 0.3)
        x = -75 + np.cumsum(length + gap) - length / 2
        height = height + rng.uniform(0, 14) * (rng.random(12) < 0.7)
        back = np.full(12, front)
        keep = clear_of_cross(build, x, length / 2)
        if road.side[index]:
            back += rng.uniform(6, 25, 12)
            keep &= rng.random(12) < 0.3
        rows.append(np.stack([x, sign * (back + depth / 2), length, depth, height], -1)[keep])
        if rng.random() < 0.6:
            x, size, tall, s = rng.uniform((-80, 10, 12, 30), (120, 25, 45, 60), (5, 4)).T
            far = np.stack([x, sign * (front + s), size, size, tall], -1)
            rows.append(far[clear_of_cross(build, x, size / 2)])
    x, s, length, depth, height = np.concatenate(rows).T
    x, y, angle = road.place(x, s)
    count = len(x)
    wall = pick(rng, WALL_ODDS, count)
    # Some houses wear the colour of this scene's road or sidewalk.
    same = rng.random(count) < 0.25
    wall[same] = road.colours[rng.integers(0, 2, count)[same] * 2]
    glass = rng.uniform(0.04, 0.3, (count, 1)) * rng.uniform(0.8, 1.2, (count, 3))
    if build.light.night:
        glass = glass + (rng.random((count, 1)) < 0.7) * np.array([4.5, 3.6, 2.0])
    pitch, storey, fill = rng.uniform((1.8, 2.7, 0.2), (4.5, 3.6, 0.7), (count, 3)).T
    fill = np.where(fill < 0.3, 0.0, fill)
    foot = build.boxes(
        (x, y, angle, length, depth, 0.0, height),
        BUILDING,
        wall,
        HOUSES - np.hypot(x, y),
        Finish(0.09, 1.5, (FACADE, FACADE, FACADE, FACADE, PLAIN), glass, (pitch, storey, fill)),
    )
    build.shade(foot, height, floor=False)
    return foot


def fences(build: Builder) -> None:
    """Add hedges and low walls behind the sidewalks."""
    rng, road = build.rng, build.layout
    for index in (0, 1):
        sign, edge, front = _sides(build, index)
        if front - edge < 1 and road.side[index] == 0 or rng.random() < 0.35:
            continue
        hedge = rng.random() < 0.5
        length, gap = rng.uniform((5, 0), (16, 5), (8, 2)).T
        x = -40 + np.cumsum(length + gap) - length / 2
        keep = clear_of_cross(build, x, length / 2)
        if not keep.any():
            continue
        x, length = x[keep], length[keep]
        count = len(x)
        x, y, angle = road.place(x, np.full(count, sign * (edge + 0.5)))
        height = np.full(count, rng.uniform(0.7, 1.5))
        colour = np.repeat(_leaves(rng, 1) if hedge else pick(rng, WALL_ODDS, 1), count, 0)
        finish = _LEAVES if hedge else Finish(0.08, 2.0, (BANDS,) * 4 + (PLAIN,), colour * 0.7)
        foot = build.boxes(
            (x, y, angle, length, np.full(count, 0.7 if hedge else 0.25), 0.0, height),
            VEGETATION if hedge else BUILDING,
            colour,
            FENCES - np.hypot(x, y),
            finish,
        )
        build.shade(foot, height)


def plants(build: Builder) -> None:
    """Add trees along the sidewalk, trees and bushes on open ground."""
    rng, road = build.rng, build.layout
    places = []
    for index in (0, 1):
        sign, edge, front = _sides(build, index)
        near = int(rng.integers(0, 9)) if road.verge[index] or rng.random() < 0.4 else 0
        wild = (2, 22, 9)[road.side[index]]
        x = np.concatenate([-35 + np.cumsum(rng.uniform(6, 16, near)), rng.uniform(-50, 90, wild)])
        line = road.half + max(road.verge[index] / 2, 0.8)
        out = max(front, edge + 0.8) + rng.random(wild) ** 1.5 * 28
        s = sign * np.concatenate([np.full(near, line), out])
        layer = np.where(np.arange(near + wild) < near, 0.0, HOUSES)
        places.append(np.stack([x, s, layer], -1)[clear_of_cross(build, x, 1.0)])
    x, s, layer = np.concatenate(places).T
    x, y, _ = road.place(x, s)
    keep = np.hypot(x, y) > 5
    low = (rng.random(len(x)) < 0.35) & (layer < 0)
    key = layer - np.hypot(x, y)
    for chosen, plant in ((keep & low, _bushes), (keep & ~low, _trees)):
        if chosen.any():
            plant(build, x[chosen], y[chosen], key[chosen])


def _leaves(rng: np.random.Generator, count: int) -> Floats:
    green = np.array([0.15, 0.27, 0.08]) * rng.uniform(0.6, 1.5, (count, 1))
    autumn = np.array([0.42, 0.26, 0.08]) * rng.uniform(0.6, 1.2, (count, 1))
    mix = min(max(rng.normal(0.15, 0.35), 0), 1)
    tint = rng.uniform(0.8, 1.2, (count, 3))
    return ((green * (1 - mix) + autumn * mix) * tint).astype(np.float32)


def _bushes(build: Builder, x: Floats, y: Floats, key: Floats) -> None:
    rng, count = build.rng, len(x)
    size = rng.uniform(0.5, 1.5, (count, 1))
    wide = size * rng.uniform(0.7, 1.1, (count, 2))
    figure = discs(np.array([-0.5, 0.5]) * size, size * 0.6, wide, size * 0.8)
    colour = np.repeat(_leaves(rng, count)[:, None], 2, 1)
    build.boards(x, y, figure, VEGETATION, colour, key, _LEAVES)


def _trees(build: Builder, x: Floats, y: Floats, key: Floats) -> None:
    rng, count = build.rng, len(x)
    tall = rng.uniform(4, 10, (count, 1))
    wide = tall * rng.uniform(0.18, 0.32, (count, 1))
    bark = np.array([0.2, 0.15, 0.1]) * rng.uniform(0.6, 1.6, (count, 1))
    trunk = trapezium(0.06 * tall, 0 * tall, 0.6 * tall, 0.7)
    part = np.arange(3 if rng.random() < 0.25 else 5)
    if len(part) == 3:
        low = tall * (0.15 + 0.25 * part)
        crown = trapezium(2 * wide * (1 - 0.22 * part), low, low + 0.4 * tall, 0.05)
    else:
        across, up, size = rng.uniform((-0.6, -0.18, 0.5), (0.6, 0.18, 0.85), (count, 5, 3)).T
        size = wide * size.T
        crown = discs(across.T * wide, tall * (0.72 + up.T), size, size * 1.1)
    leaves = _leaves(rng, count)[:, None] * (0.78 + 0.11 * part)[:, None]
    build.boards(x, y, trunk, VEGETATION, bark[:, None], key)
    build.boards(x, y, crown, VEGETATION, leaves, key + 1e-3, _LEAVES)
    foot = np.stack([x, y], -1)[:, None]
    middle = foot + build.reach * 0.7 * tall[:, None]
    build.patch(middle + 0.7 * SQUARE * wide[:, None])
    build.shade(foot + 0.15 * SQUARE, 0.7 * tall[:, 0], floor=False, top=False)
