# SPDX-License-Identifier: Apache-2.0
"""Road, materials and light of one synthetic scene; metres, x ahead, y left, z up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

CLASSES = (
    "sky",
    "road",
    "lane marking",
    "sidewalk",
    "building",
    "vegetation",
    "vehicle",
    "pedestrian",
    "pole",
    "ground",
)
SKY, ROAD, MARKING, SIDEWALK, BUILDING, VEGETATION, VEHICLE, PEDESTRIAN, POLE, GROUND = range(10)

# RGB colour of each class in pictures of labels.
PALETTE = (
    (135, 190, 235),
    (90, 90, 95),
    (250, 240, 120),
    (215, 145, 190),
    (150, 90, 60),
    (60, 140, 60),
    (40, 70, 200),
    (220, 40, 50),
    (250, 150, 30),
    (180, 170, 110),
)

# Reflectance of surfaces. Roads, pavements, walls and open ground draw from one table on
# purpose: a grey patch alone does not tell what it belongs to.
MATERIALS = np.array(
    [
        (0.16, 0.16, 0.17),  # fresh asphalt
        (0.28, 0.28, 0.29),  # worn asphalt
        (0.43, 0.42, 0.40),  # concrete
        (0.56, 0.53, 0.48),  # light stone
        (0.45, 0.27, 0.21),  # brick
        (0.58, 0.48, 0.34),  # sand
        (0.34, 0.25, 0.17),  # soil
        (0.22, 0.34, 0.13),  # grass
        (0.45, 0.43, 0.22),  # dry grass
        (0.72, 0.69, 0.64),  # plaster
        (0.32, 0.37, 0.44),  # slate
    ],
    np.float32,
)
_ROAD_ODDS = (5, 5, 4, 1, 1, 2, 1, 0, 0, 0, 2)
_WALK_ODDS = (1, 3, 5, 4, 3, 2, 1, 0, 0, 1, 3)
_OPEN_ODDS = (0, 1, 2, 1, 1, 4, 4, 5, 4, 0, 0)
WALL_ODDS = (1, 2, 4, 4, 5, 3, 1, 0, 0, 5, 4)

_WALKS = (0.0, 1.6, 2.4, 3.5, 4.5)

# Rows of a layout's ground colours.
G_ROAD, G_MARK, G_WALK, G_OPEN, G_CURB, G_PATCH = range(6)
GROUND_CLASS = np.array([ROAD, MARKING, SIDEWALK, GROUND, SIDEWALK, ROAD], np.uint8)


def choose(rng: np.random.Generator, weights: Sequence[float], count: int) -> NDArray[np.int64]:
    """Draw ``count`` numbers below ``len(weights)`` with these weights."""
    steps = np.cumsum(weights)
    return np.searchsorted(steps, rng.random(count) * steps[-1], side="right")


def pick(rng: np.random.Generator, weights: tuple[int, ...], count: int) -> Floats:
    """Colours (count, 3) of materials drawn with the given weights, each a little varied."""
    base = MATERIALS[choose(rng, weights, count)]
    tint = rng.normal(1.0, (0.13, 0.07, 0.07), (count, 3))
    tint[:, 1:] *= tint[:, :1]
    return np.clip(base * tint, 0.04, 0.95).astype(np.float32)


@dataclass(frozen=True)
class Light:
    """Sun, sky and camera response of a scene; colours are (3,) linear RGB factors."""

    sun: Floats
    sun_colour: Floats
    ambient: Floats
    zenith: Floats
    horizon: Floats
    cloud: float
    fog: float
    night: bool
    shadow: float
    texture: float
    noise: float
    blur: float


@dataclass(frozen=True)
class Layout:
    """Road geometry. The lateral offset s is positive to the left of the road's centre line.

    Attributes:
        offset: y of the centre line at x = 0.
        slope: dy/dx there.
        curve: Second derivative.
        lane: Lane width.
        lanes: Lanes per direction.
        parking: Width of the parking strip at each side.
        verge: Strip between road and sidewalk, (left, right).
        walk: Sidewalk width, (left, right); 0 is none.
        front: Distance from the sidewalk to the house fronts, (left, right).
        side: What stands between walk and fronts, (left, right): 0 houses, 1 trees, 2 little.
        cross: x of the crossing road; 0 is none.
        cross_half: Half its width.
        style: Centre line: 0 none, 1 dashed, 2 solid, 3 double.
        edge: Whether solid lines mark the edges of the lanes.
        zebra: Whether the crossing has zebra markings.
        line: Half width of the lines.
        dash: (period, painted part) of dashed lines.
        wear: How much paint is lost, 0..1.
        tiles: (period, line width) of the joints of sidewalks; width 0 is none.
        slabs: Whether the road has joints as well.
        colours: (6, 3) reflectance of the ground materials.
        tilt: Pitch and roll of the vehicle in radians.
    """

    offset: float
    slope: float
    curve: float
    lane: float
    lanes: int
    parking: float
    verge: tuple[float, float]
    walk: tuple[float, float]
    front: tuple[float, float]
    side: tuple[int, int]
    cross: float
    cross_half: float
    style: int
    edge: bool
    zebra: bool
    line: float
    dash: tuple[float, float]
    wear: float
    tiles: tuple[float, float]
    slabs: bool
    colours: Floats
    tilt: tuple[float, float]

    @property
    def half(self) -> float:
        """Half the road's width, parking included."""
        return self.lanes * self.lane + self.parking

    def centre(self, x: Floats) -> tuple[Floats, Floats]:
        """y and slope of the centre line at x; straight beyond 80 m."""
        near = np.clip(x, -80, 80)
        y = self.offset + self.slope * x + self.curve * near * (x - near / 2)
        return y, self.slope + self.curve * near

    def place(self, x: Floats, s: Floats) -> tuple[Floats, Floats, Floats]:
        """World x, y and direction of the road for distances x along it and offsets s."""
        y, slope = self.centre(x)
        angle = np.arctan(slope)
        return x - s * np.sin(angle), y + s * np.cos(angle), angle


def draw_layout(rng: np.random.Generator) -> Layout:
    """Draw the road of a scene."""
    u = rng.random(26).tolist()
    lanes = 1 + (u[0] > 0.5) + (u[0] > 0.9)
    lane = 3.0 + 0.9 * u[1]
    parking = 2.3 if u[2] < 0.4 else 0.0
    driven = int(u[3] * lanes)
    crossing = (12 + 45 * u[4]) * (1 if u[4] < 0.7 else -0.6) if u[5] < 0.55 else 0.0
    sides = choose(rng, (0.65, 0.2, 0.15), 2).tolist()
    verge = choose(rng, (0.5, 0.25, 0.25), 2).tolist()
    width = choose(rng, (0.12, 0.2, 0.28, 0.25, 0.15), 2).tolist()
    ground = np.concatenate(
        [pick(rng, _ROAD_ODDS, 1), pick(rng, _WALK_ODDS, 1), pick(rng, _OPEN_ODDS, 1)]
    )
    paint = (0.85, 0.83, 0.8) if u[6] < 0.75 else (0.8, 0.62, 0.18)
    road, walk, open_ground = ground
    colours = np.array(
        [road, paint, walk, open_ground, walk * (0.75 + 0.6 * u[7]), road * (0.7 + 0.7 * u[8])],
        np.float32,
    )
    return Layout(
        offset=(driven + 0.5) * lane + 0.6 * (u[9] - 0.5),
        slope=0.12 * (u[10] - 0.5),
        curve=(u[11] - 0.5) / 45 if u[12] < 0.6 else 0.0,
        lane=lane,
        lanes=lanes,
        parking=parking,
        verge=((0.0, 1.5, 2.5)[verge[0]], (0.0, 1.5, 2.5)[verge[1]]),
        walk=(_WALKS[width[0]], _WALKS[width[1]]),
        front=(0.3 + 6 * u[24] ** 2, 0.3 + 6 * u[25] ** 2),
        side=(int(sides[0]), int(sides[1])),
        cross=crossing,
        cross_half=3.2 + 4 * u[13],
        style=int(u[14] * 4) if u[15] < 0.92 else 0,
        edge=u[16] < 0.45,
        zebra=u[17] < 0.65,
        line=0.11 + 0.09 * u[18],
        dash=(5 + 5 * u[19], 0.35 + 0.3 * u[20]),
        wear=0.5 * u[21] ** 2,
        tiles=(0.9 + 3 * u[22], 0.05 + 0.04 * u[23] if u[22] < 0.5 else 0.0),
        slabs=u[23] < 0.3,
        colours=np.clip(colours, 0.03, 0.95),
        tilt=(float(rng.normal(0, 0.025)), float(rng.normal(0, 0.012))),
    )


def draw_light(rng: np.random.Generator) -> Light:
    """Draw time of day, weather and camera response of a scene."""
    u = rng.random(12).tolist()
    azimuth, night, dusk, dull = 2 * np.pi * u[0], u[1] < 0.1, u[1] > 0.85, 0.55 < u[1] < 0.85
    height = np.sin(np.radians(8 + 14 * u[2] if dusk else 25 + 45 * u[2]))
    flat = np.sqrt(1 - height**2)
    sun = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), height])
    if night:
        sun_colour, ambient = np.array([0.1, 0.12, 0.18]), np.array([0.13, 0.14, 0.2])
        zenith, horizon = np.array([0.02, 0.03, 0.07]), np.array([0.1, 0.09, 0.1])
    elif dusk:
        sun_colour, ambient = np.array([1.0, 0.62, 0.35]), np.array([0.34, 0.33, 0.42])
        zenith, horizon = np.array([0.3, 0.36, 0.58]), np.array([0.92, 0.66, 0.46])
    elif dull:
        sun_colour, ambient = np.array([0.2, 0.2, 0.2]), np.array([0.72, 0.74, 0.78])
        zenith, horizon = np.array([0.62, 0.66, 0.72]), np.array([0.78, 0.8, 0.82])
    else:
        sun_colour, ambient = np.array([0.95, 0.9, 0.8]), np.array([0.38, 0.42, 0.5])
        zenith, horizon = np.array([0.22, 0.42, 0.78]), np.array([0.72, 0.8, 0.88])
    tint = rng.normal(1.0, 0.06, 3) * (0.75 + 0.5 * u[3])
    return Light(
        sun=sun.astype(np.float32),
        sun_colour=(sun_colour * tint).astype(np.float32),
        ambient=(ambient * tint).astype(np.float32),
        zenith=(zenith * tint).astype(np.float32),
        horizon=(horizon * tint).astype(np.float32),
        cloud=u[4] * (0.9 if dull else 0.6),
        fog=0.002 + 0.03 * u[5] ** 3,
        night=night,
        shadow=0.05 if dull else 0.5 if night else 0.75,
        texture=0.5 + u[6],
        noise=0.008 + 0.03 * u[7] ** 2,
        blur=0.3 + 0.5 * u[8],
    )
