# SPDX-License-Identifier: Apache-2.0
"""Cameras and classes of ORION's data, and the class of every CARLA blueprint."""

from __future__ import annotations

from kdfast.models.orion.config import CLASSES as DETECTION_CLASSES

# Sensor name in annotations -> folder of its pictures, in ORION's order.
CAMERAS = {
    "CAM_FRONT": "rgb_front",
    "CAM_FRONT_LEFT": "rgb_front_left",
    "CAM_FRONT_RIGHT": "rgb_front_right",
    "CAM_BACK": "rgb_back",
    "CAM_BACK_LEFT": "rgb_back_left",
    "CAM_BACK_RIGHT": "rgb_back_right",
}
# Training frames of Bench2Drive's base set, as ORION counts them.
TRAIN_FRAMES = 234_769
TRAFFIC_LIGHT = DETECTION_CLASSES.index("traffic_light")
# Red, yellow, green; 3 is a light that is off or unknown and has no state to learn.
LIGHT_STATES = ("red", "yellow", "green", "off")

_PARKED = "/Game/Carla/Static/Car/4Wheeled/ParkedVehicles/"
_MEMBERS = {
    "bicycle": "vehicle.bh.crossbike vehicle.diamondback.century vehicle.gazelle.omafiets",
    "van": "vehicle.ford.ambulance",
    "truck": "vehicle.carlamotors.firetruck",
    "traffic_sign": "traffic.stop traffic.yield",
    "traffic_light": "traffic.traffic_light",
    "others": "static.prop.dirtdebris01 static.prop.dirtdebris02",
    "traffic_cone": "static.prop.warningconstruction static.prop.warningaccident "
    "static.prop.trafficwarning static.prop.constructioncone",
    "car": "vehicle.audi.etron vehicle.audi.tt vehicle.chevrolet.impala "
    "vehicle.dodge.charger_2020 vehicle.dodge.charger_police vehicle.dodge.charger_police_2020 "
    "vehicle.lincoln.mkz_2017 vehicle.lincoln.mkz_2020 vehicle.mini.cooper_s_2021 "
    "vehicle.mercedes.coupe_2020 vehicle.ford.mustang vehicle.ford.crown "
    "vehicle.nissan.patrol_2021 vehicle.tesla.model3",
}
_CLASS_OF = {name: label for label, names in _MEMBERS.items() for name in names.split()}
_BY_PREFIX = {
    "walker.pedestrian.": "pedestrian",
    "traffic.speed_limit.": "traffic_sign",
    f"{_PARKED}VolkswagenT2/": "van",
    _PARKED: "car",
}


def detection_class(name: str) -> int:
    """Index into ``DETECTION_CLASSES`` of a CARLA blueprint or class name; -1 if it has none."""
    label = name if name in DETECTION_CLASSES else _CLASS_OF.get(name)
    if label is None:
        label = next((value for start, value in _BY_PREFIX.items() if name.startswith(start)), None)
    return -1 if label is None else DETECTION_CLASSES.index(label)


def light_state(state: object) -> int:
    """Index into ``LIGHT_STATES`` of an annotated state: CARLA's number or name.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(state, bool) or not isinstance(state, int | float | str):
        raise ValueError(f"state of a traffic light: must be a number or a name, got {state!r}")
    if isinstance(state, str) and not state.strip().isdigit():
        name = state.rsplit(".", 1)[-1].lower()
        if name not in (*LIGHT_STATES, "unknown"):
            raise ValueError(
                f"state of a traffic light: must be one of {LIGHT_STATES}, got {state!r}"
            )
        return 3 if name == "unknown" else LIGHT_STATES.index(name)
    number = int(state)
    if number < 0:
        raise ValueError(f"state of a traffic light: must be 0 or more, got {state!r}")
    return min(number, 3)
