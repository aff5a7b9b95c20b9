# SPDX-License-Identifier: Apache-2.0
"""Which material lies where on the ground of a synthetic scene."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdfast.data.scenes.layout import (
    G_CURB,
    G_MARK,
    G_OPEN,
    G_PATCH,
    G_ROAD,
    G_WALK,
    Floats,
    Layout,
)


def ground_kind(road: Layout, x: Floats, y: Floats, worn: Floats) -> NDArray[np.int64]:
    """Material of points on the ground.

    Args:
        road: The road.
        x: (n,) places.
        y: (n,) places.
        worn: (n,) noise in -1..1 that repairs the road and wears its paint.

    Returns:
        (n,) of the numbers ``G_ROAD`` to ``G_PATCH``.
    """
    centre, slope = road.centre(x)
    s = (y - centre) / np.sqrt(1 + slope * slope)
    left = s > 0
    a = np.abs(s)
    past = a - np.float32(road.half)
    verge, walk = (
        np.where(left, np.float32(pair[0]), np.float32(pair[1])) for pair in (road.verge, road.walk)
    )
    kind = np.where((past >= verge) & (past < verge + walk), G_WALK, G_OPEN)
    np.copyto(kind, G_CURB, where=(past < 0.18) & (walk > 0))
    on_road = past < 0
    across = np.full_like(x, 1e3)
    if road.cross:
        across = np.abs(x - np.float32(road.cross)) - np.float32(road.cross_half)
        np.copyto(kind, G_WALK, where=(across < max(road.walk)) & (across >= 0))
        on_road |= across < 0
    np.copyto(kind, np.where(worn > 0.45, G_PATCH, G_ROAD), where=on_road)
    paint = _along_lines(road, x, a) & on_road & (across > 4.5)
    if road.cross:
        paint |= _crossing_lines(road, x, y, s, across)
    np.copyto(kind, G_MARK, where=paint & (worn > 1.6 * road.wear - 0.95))
    return kind


def _along_lines(road: Layout, x: Floats, a: Floats) -> NDArray[np.bool_]:
    # Lines of the main road at distances a from its centre line.
    index = np.rint(a / np.float32(road.lane))
    line = np.abs(a - index * np.float32(road.lane)) < road.line
    dashed = _dash(road, x)
    paint = line & dashed & (index > 0) & (index < road.lanes)
    if road.style == 3:
        paint |= np.abs(a - 1.8 * road.line) < road.line
    elif road.style:
        paint |= line & (index == 0) & (dashed if road.style == 1 else True)
    if road.edge:
        paint |= line & (index == road.lanes)
    return paint


def _crossing_lines(
    road: Layout, x: Floats, y: Floats, s: Floats, across: Floats
) -> NDArray[np.bool_]:
    # Stop lines, zebra and the crossing road's own centre line.
    a, inbound = np.abs(s), (s < 0) == (x < road.cross)
    paint = (across > 4.8) & (across < 5.3) & (a < road.lanes * road.lane) & inbound
    if road.zebra:
        stripes = a * np.float32(1 / 1.1)
        striped = stripes - np.floor(stripes) < 0.5
        paint |= (across > 1.5) & (across < 4.2) & (a < road.half - 0.2) & striped
    middle = np.abs(x - np.float32(road.cross)) < road.line
    return paint | (middle & (a > road.half + 5) & _dash(road, y))


def _dash(road: Layout, along: Floats) -> NDArray[np.bool_]:
    period, painted = road.dash
    turns = along * np.float32(1 / period)
    return turns - np.floor(turns) < painted
