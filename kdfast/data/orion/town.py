# SPDX-License-Identifier: Apache-2.0
"""A small town that moves: roads, cars, walkers, lights and signs of a synthetic clip.

Everything is in CARLA's left-handed world (x ahead, y to the right, z up, metres), as the
annotations of Bench2Drive are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kdfast.data.orion.geometry import Floats, turn

LANE = 3.5
# Length, width, height and colours (BGR) of what stands or drives in the town.
SHAPES: dict[str, tuple[float, float, float]] = {
    "vehicle.audi.tt": (4.2, 2.0, 1.4),
    "vehicle.tesla.model3": (4.8, 2.2, 1.5),
    "vehicle.ford.ambulance": (6.4, 2.4, 2.4),
    "vehicle.carlamotors.firetruck": (8.5, 2.9, 3.8),
    "vehicle.diamondback.century": (1.7, 0.6, 1.6),
    "walker.pedestrian.0001": (0.6, 0.6, 1.8),
    "walker.pedestrian.0015": (0.6, 0.6, 1.7),
    "static.prop.constructioncone": (0.6, 0.6, 0.9),
    "static.prop.dirtdebris01": (1.2, 1.0, 0.4),
    "traffic.traffic_light": (0.5, 0.5, 1.0),
    "traffic.speed_limit.60": (0.2, 0.7, 0.7),
}
_COLOURS = ((40, 40, 190), (190, 120, 40), (60, 160, 60), (200, 200, 205), (40, 180, 220))
_ROLES = {"vehicle": "vehicle", "walker": "walker", "static": "traffic_sign"}


@dataclass
class Thing:
    """Something with a box.

    Attributes:
        number: Id.
        name: CARLA blueprint.
        place: (3,) centre of its bottom at the start.
        yaw: Heading in radians, from x towards y.
        speed: Metres a second along the heading.
        colour: BGR.
        state: Of a traffic light at the start.
    """

    number: int
    name: str
    place: Floats
    yaw: float
    speed: float
    colour: tuple[int, int, int]
    state: int = 0

    @property
    def size(self) -> tuple[float, float, float]:
        """Length, width and height."""
        return SHAPES[self.name]

    @property
    def role(self) -> str:
        """Class in the annotation."""
        if self.name == "traffic.traffic_light":
            return "traffic_light"
        return _ROLES.get(self.name.split(".")[0], "traffic_sign")

    def pose(self, time: float) -> Floats:
        """Its frame in the world (4, 4), at the centre of its bottom."""
        out = np.eye(4)
        out[:3, :3] = turn(self.yaw)
        ahead = np.array([np.cos(self.yaw), np.sin(self.yaw), 0])
        out[:3, 3] = self.place + self.speed * time * ahead
        return out

    def light(self, time: float) -> int:
        """State of a traffic light: it changes every four seconds."""
        return (self.state + int(time // 4)) % 3


@dataclass(frozen=True)
class Line:
    """A lane marking or the middle of a lane: type of Bench2Drive's map, and points (n, 3)."""

    kind: str
    points: Floats


@dataclass(frozen=True)
class Clip:
    """A street and what happens on it.

    Attributes:
        lanes: Lanes in each direction.
        bend: Curvature of the street, one over metres.
        lines: Markings and middles of the lanes.
        volumes: Trigger volumes: type and outline (4, 3).
        things: What stands, walks and drives.
        ego_speed: Metres a second.
        sun: Brightness of the picture.
    """

    lanes: int
    bend: float
    lines: tuple[Line, ...]
    volumes: tuple[Line, ...]
    things: tuple[Thing, ...]
    ego_speed: float
    sun: float
    sky: tuple[int, int, int] = field(default=(235, 205, 170))

    def at(self, along: float, across: float) -> tuple[Floats, float]:
        """Place (3,) and heading ``along`` metres down the street and ``across`` to the right."""
        return street(self.bend, along, across)

    def ego(self, time: float) -> Floats:
        """Frame of the ego in the world (4, 4), on the ground; it keeps to its lane."""
        place, yaw = self.at(self.ego_speed * time, LANE / 2)
        out = np.eye(4)
        out[:3, :3], out[:3, 3] = turn(yaw), place
        return out


def street(bend: float, along: float, across: float) -> tuple[Floats, float]:
    """Place (3,) and heading on a street that starts at the origin and turns by ``bend``."""
    yaw = bend * along
    if abs(bend) < 1e-9:
        middle = np.array([along, 0.0])
    else:
        middle = np.array([np.sin(yaw), 1 - np.cos(yaw)]) / bend
    side = np.array([-np.sin(yaw), np.cos(yaw)]) * across
    return np.array([*(middle + side), 0.0]), yaw


def draw_clip(rng: np.random.Generator, seconds: float) -> Clip:
    """Draw a street and its traffic for a clip of this length."""
    lanes, bend = int(rng.integers(1, 3)), float(rng.choice([0.0, 0.004, -0.004]))
    ego_speed = float(rng.uniform(3, 8))
    reach = (-60.0, ego_speed * seconds + 70.0)
    along = np.arange(*reach, 1.0)

    def line(kind: str, across: float) -> Line:
        return Line(kind, np.array([street(bend, s, across)[0] for s in along]))

    edges = np.arange(-lanes, lanes + 1) * LANE
    kinds = {-lanes: "Solid", 0: "SolidSolid" if lanes > 1 else "Broken", lanes: "Solid"}
    lines = [line(kinds.get(i - lanes, "Broken"), edge) for i, edge in enumerate(edges)]
    lines += [line("Center", edge + LANE / 2) for edge in edges[:-1]]
    things: list[Thing] = []
    drive = _Traffic(rng, bend, things)
    for _ in range(int(rng.integers(4, 9))):
        drive.car(lanes, reach, ego_speed)
    for _ in range(int(rng.integers(2, 6))):
        drive.roadside(lanes, reach)
    crossing = float(rng.uniform(15, ego_speed * seconds + 30))
    drive.light(crossing, lanes)
    corners = [
        street(bend, crossing - back, side)[0]
        for back, side in ((0, 0), (0, LANE), (2, LANE), (2, 0))
    ]
    volume = Line("TrafficLight", np.array(corners))
    sun = float(rng.uniform(0.6, 1.0))
    return Clip(lanes, bend, tuple(lines), (volume,), tuple(things), ego_speed, sun)


class _Traffic:
    def __init__(self, rng: np.random.Generator, bend: float, things: list[Thing]) -> None:
        self.rng, self.bend, self.things = rng, bend, things

    def add(self, name: str, along: float, across: float, turned: float, speed: float) -> None:
        place, yaw = street(self.bend, along, across)
        colour = _COLOURS[int(self.rng.integers(len(_COLOURS)))]
        number = 100 + len(self.things)
        self.things.append(Thing(number, name, place, yaw + turned, speed, colour))

    def car(self, lanes: int, reach: tuple[float, float], ego_speed: float) -> None:
        names = [name for name in SHAPES if name.startswith("vehicle")]
        lane = int(self.rng.integers(-lanes, lanes))
        along = float(self.rng.uniform(reach[0] + 10, reach[1] - 10))
        if lane == 0 and abs(along) < 9:
            along += 18
        # Who is in the ego's lane keeps its distance.
        speed = ego_speed if lane == 0 else float(self.rng.uniform(0, 8))
        turned = 0.0 if lane >= 0 else np.pi
        name = names[int(self.rng.integers(len(names)))]
        self.add(name, along, (lane + 0.5) * LANE, turned, speed)

    def roadside(self, lanes: int, reach: tuple[float, float]) -> None:
        names = [n for n in SHAPES if n.startswith(("walker", "static", "traffic.speed"))]
        name = names[int(self.rng.integers(len(names)))]
        side = float(self.rng.choice([-1, 1])) * (lanes * LANE + float(self.rng.uniform(1, 5)))
        speed = float(self.rng.uniform(0.5, 1.5)) if name.startswith("walker") else 0.0
        self.add(name, float(self.rng.uniform(*reach)), side, 0.0, speed)

    def light(self, along: float, lanes: int) -> None:
        self.add("traffic.traffic_light", along, lanes * LANE + 1, np.pi, 0.0)
        self.things[-1].place[2] = 3.0
        self.things[-1].state = int(self.rng.integers(3))
