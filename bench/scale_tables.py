# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/scale.md, of measured inputs and assumptions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from bench.gpu_tables import table
from bench.rows import facts_line
from bench.scale_model import (
    CASES,
    SAVE_EVERY,
    SLOW,
    Inputs,
    Step,
    break_even,
    checkpoint_seconds,
    efficiency,
    fill_hours,
    hours,
    move_seconds,
    reduce_seconds,
    sgd_bytes,
    step_of,
    steps_of,
    stops,
)
from bench.scale_settings import BILLION, Assumptions, Setting, settings, shown

# A number of GPUs at which tables that have no column for it are.
MANY = 64
# A recipe that bears larger steps: by this factor.
LARGER = 4
NAMES = {"orion50": "`orion50`", "vit_l_to_s": "ViT-L -> ViT-S"}


# Name, seconds, and up to the double of how many seconds it is used.
UNITS = (("s", 1, 60), ("min", 60, 3600), ("h", 3600, math.inf))


def blocks(inputs: Inputs, chosen: Assumptions) -> dict[str, str]:
    """The generated parts of the page by name."""
    every = settings(chosen)
    machine = inputs["machine"]
    return {
        "scale machine": f"{facts_line(machine)}.",
        "scale assumptions": assumptions(chosen),
        "scale work": work(inputs),
        "scale memory": memory(inputs),
        "scale pictures": pictures(inputs, chosen, every),
        "scale rates": rates(inputs, chosen, every),
        **{f"scale {s.key}": timed(s, inputs, chosen) for s in every},
        "scale epochs": epochs(inputs, chosen, every),
        "scale stops": stopping(inputs, chosen, every),
        "scale remedies": remedies(inputs, chosen, every),
        "scale bytes": sent(inputs, chosen),
        "scale cache bytes": cache_bytes(inputs, every),
        "scale cache": cached(inputs, chosen, every),
        "scale features": features(inputs, every[0]),
        "scale alone": alone(inputs, chosen, every),
        "scale order": order(inputs),
        "scale shards": shards(inputs),
        "scale drawn": drawn(inputs),
    }


def span(values: Sequence[float], digits: int = 2) -> str:
    """The slow and the fast case, as "12 to 5"; one number where they are the same."""
    texts = list(dict.fromkeys(number(x, digits) for x in values))
    return " to ".join(texts)


def lasting(seconds: Sequence[float]) -> str:
    """The slow and the fast case of a time in the unit that fits both."""
    unit, factor = next(u for u in UNITS if max(seconds) < 2 * u[2])[:2]
    return f"{span([x / factor for x in seconds])} {unit}"


def number(value: float, digits: int = 2) -> str:
    """A number to some digits, without exponents."""
    if math.isinf(value):
        return "never"
    if value == 0 or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def size(value: float) -> str:
    """Bytes in the unit that fits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{number(value / factor, 3)} {unit}"
    return f"{value:.0f} B"


def assumptions(chosen: Assumptions) -> str:
    """Every assumption, its option and its value."""
    rows = [
        [words, f"`--{name.replace('_', '-')}`", shown(value)]
        for name, value, words in chosen.pairs()
    ]
    return table(["assumed", "option", "slow and fast case"], rows)


def work(inputs: Inputs) -> str:
    """Operations and parameters by training."""
    rows = []
    for key, found in inputs["work"].items():
        parts = ("teacher_forward", "student_forward", "step", "step_checkpointed")
        values = [number(found[part] / 1e9, 4) for part in parts]
        params = [f"{found[name] / 1e6:.1f}M" for name in ("teacher_params", "trained_params")]
        rows.append([NAMES[key], " x ".join(map(str, found["image_size"])), *values, *params])
    header = ["training", "picture", "teacher forward", "student forward", "whole step"]
    return table([*header, "with checkpointing", "teacher", "trained"], rows)


def memory(inputs: Inputs) -> str:
    """Memory of the largest batch that fits, by purpose, and what sharding would leave."""
    rows = []
    for key, found in inputs["work"].items():
        for name, title in (("plans", ""), ("plans_cached", ", teacher cache")):
            if name not in found:
                continue
            plan = found[name][-1]
            held = plan["categories"]
            state = held["parameters"] + held["optimizer states"] + 4 * found["trained_params"]
            parts = ("parameters", "optimizer states", "frozen models", "saved for backward")
            rows.append(
                [
                    NAMES[key] + title,
                    plan["batch"],
                    "yes" if plan["checkpointing"] else "no",
                    *(gib(held.get(part, 0)) for part in parts),
                    f"**{gib(plan['peak_bytes'])}**",
                    gib(state * (1 - 1 / MANY)),
                ]
            )
    header = ["training", "batch", "checkpointing", "parameters", "optimizer", "teacher", "saved"]
    return table([*header, "needed", f"FSDP on {MANY} saves"], rows)


def gib(value: float) -> str:
    """Bytes as GiB."""
    return number(value / 2**30, 3)


def pictures(inputs: Inputs, chosen: Assumptions, every: Sequence[Setting]) -> str:
    """What a core makes of pictures, and what a GPU asks for."""
    rows = []
    for setting in every[:2]:
        data = inputs["data"][setting.data]
        asked = [asks(setting, inputs, chosen, chosen.node, case) for case in CASES]
        rows.append(
            [
                setting.title,
                " x ".join(map(str, reversed(data["sides"]))),
                size(data["file_bytes"]),
                number(data["cpu_ms"], 3),
                number(1e3 / data["cpu_ms"], 3),
                span(asked),
                span([rate * data["cpu_ms"] / 1e3 for rate in asked]),
            ]
        )
    header = ["training", "files", "bytes each", "CPU ms", "pictures/s of a core"]
    return table([*header, "pictures/s that a GPU asks for", "cores that it needs"], rows)


def asks(setting: Setting, inputs: Inputs, chosen: Assumptions, gpus: int, case: int) -> float:
    """Pictures a second that a GPU takes if it never waits for them."""
    step = step_of(setting, inputs, chosen, gpus, case)
    return step.batch / max(step.compute + step.exposed, step.launch)


def rates(inputs: Inputs, chosen: Assumptions, every: Sequence[Setting]) -> str:
    """What all GPUs together ask of storage and cores."""
    rows = []
    for setting in every:
        data = inputs["data"][setting.data]
        for gpus in chosen.gpus:
            asked = [gpus * asks(setting, inputs, chosen, gpus, case) for case in CASES]
            rows.append(
                [
                    setting.title,
                    gpus,
                    span([float(f"{rate:.2g}") for rate in asked]),
                    span([rate * data["file_bytes"] / 1e9 for rate in asked]),
                    span([float(f"{rate * data['cpu_ms'] / 1e3:.2g}") for rate in asked]),
                ]
            )
    return table(["training", "GPUs", "pictures/s", "GB/s of files", "cores"], rows)


def timed(setting: Setting, inputs: Inputs, chosen: Assumptions) -> str:
    """A training on each number of GPUs."""
    rows = []
    for gpus in chosen.gpus:
        steps = [step_of(setting, inputs, chosen, gpus, case) for case in CASES]
        one = steps[0]
        limits = dict.fromkeys(step.limit for step in steps)
        used = [efficiency(setting, inputs, chosen, gpus, case) for case in CASES]
        rows.append(
            [
                gpus,
                f"{one.batch} x {gpus} = {one.batch * gpus:,}",
                f"{steps_of(setting, one):,}",
                *(span(_ms(steps, part)) for part in ("compute", "reduce", "exposed", "data")),
                span(_ms(steps, "seconds")),
                f"**{span([hours(setting, step, setting.epochs[0]) for step in steps])}**",
                ", ".join(limits),
                span([100 * x for x in used], 3) + " %",
            ]
        )
    header = ["GPUs", "pictures a step", "steps an epoch", "compute ms", "all-reduce ms"]
    header += ["not hidden", "loading ms", "step ms", "hours", "limit", "of a GPU alone"]
    return table(header, rows)


def _ms(steps: Sequence[Step], part: str) -> list[float]:
    return [1e3 * getattr(step, part) for step in steps]


def epochs(inputs: Inputs, chosen: Assumptions, every: Sequence[Setting]) -> str:
    """Hours of the settings with several numbers of epochs."""
    rows = []
    for setting in every:
        for count in setting.epochs if len(setting.epochs) > 1 else ():
            cells = [
                span([hours(setting, _step(setting, inputs, chosen, n, c), count) for c in CASES])
                for n in chosen.gpus
            ]
            rows.append([setting.title, count, *cells])
    return table(["hours of", "epochs", *(f"{n} GPUs" for n in chosen.gpus)], rows)


def _step(setting: Setting, inputs: Inputs, chosen: Assumptions, gpus: int, case: int) -> Step:
    return step_of(setting, inputs, chosen, gpus, case)


def stopping(inputs: Inputs, chosen: Assumptions, every: Sequence[Setting]) -> str:
    """Where each training is used to less than half, and what else ends there."""
    rows = []
    for setting in every:
        whole = step_of(setting, inputs, chosen, 1, SLOW).batch
        ends = [stops(setting, inputs, chosen, case) for case in CASES]
        halves = [f"{e.gpus:,} GPUs ({e.limit})" if e else "nowhere before that" for e in ends]
        last = step_of(setting, inputs, chosen, max(chosen.gpus), SLOW)
        rows.append(
            [
                setting.title,
                f"{setting.limit:,}",
                number(setting.limit / whole, 3),
                f"{setting.limit:,}",
                *halves,
                f"{steps_of(setting, last):,}",
            ]
        )
    header = ["training", "largest step", "full GPUs up to", "one picture a GPU at"]
    header += ["below half, slow case", "fast case"]
    return table([*header, f"steps an epoch on {max(chosen.gpus)}"], rows)


def sent(inputs: Inputs, chosen: Assumptions) -> str:
    """Bytes of a gradient, whole and compressed, and of FSDP, with their times."""
    rows = []
    for key, found in inputs["work"].items():
        params, teacher = found["trained_params"], found["teacher_params"]
        ways = {
            "all-reduce, fp32": 4 * params,
            "all-reduce, bf16": 2 * params,
            f"PowerSGD of rank {chosen.rank}": sgd_bytes(found["shapes"], chosen.rank),
        }
        for way, payload in ways.items():
            times = [reduce_seconds(payload, chosen, MANY, case) for case in CASES]
            rows.append(
                [
                    NAMES[key],
                    way,
                    size(payload),
                    size(2 * payload * (1 - 1 / MANY)),
                    span([1e3 * x for x in times]),
                ]
            )
        # Weights in bf16 before forward and backward, gradients in fp32 after it.
        shard = (2 * 2 + 4) * params * (1 - 1 / MANY)
        rows.append([NAMES[key], "FSDP of the student, bf16 weights", "", size(shard), ""])
        both = shard + 2 * teacher * (1 - 1 / MANY)
        rows.append([NAMES[key], "FSDP of student and teacher", "", size(both), ""])
    header = ["training", "what is exchanged", "gradient"]
    return table([*header, f"sent by a GPU of {MANY}, a step", "ms"], rows)


def remedies(inputs: Inputs, chosen: Assumptions, every: Sequence[Setting]) -> str:
    """Hours on most GPUs, by what is done about the end of scaling."""
    most, none = max(chosen.gpus), dataclasses.replace(chosen, launch_ms=(0.0, 0.0))
    rows = []
    for setting in every:
        work = inputs["work"][setting.work]
        whole, thin = work["trained_params"], sgd_bytes(work["shapes"], chosen.rank)
        larger = dataclasses.replace(setting, limit=LARGER * setting.limit)
        ways: list[tuple[Setting, Assumptions, dict[str, Any]] | None] = [
            (setting, chosen, {}),
            (setting, chosen, {"gradient": 2 * whole}),
            (setting, chosen, {"gradient": thin}),
            (setting, none, {}),
            (setting, chosen, {"cached": True}) if "step_cached" in work else None,
            (larger, chosen, {}),
            (larger, none, {"gradient": thin}),
        ]
        cells = [""] * len(ways)
        for place, way in enumerate(ways):
            if way is not None:
                of, given, more = way
                cells[place] = span(
                    [
                        hours(of, step_of(of, inputs, given, most, case, **more), of.epochs[0])
                        for case in CASES
                    ]
                )
        rows.append([setting.title, *cells])
    header = [f"hours on {most} GPUs", "as it is", "bf16 gradients", f"PowerSGD {chosen.rank}"]
    header += ["one launch a step", "teacher cache", f"step {LARGER} times as large"]
    return table([*header, "that, PowerSGD and one launch"], rows)


def cached(inputs: Inputs, chosen: Assumptions, every: Sequence[Setting]) -> str:
    """The teacher's outputs on disk instead of the teacher."""
    rows = []
    for setting in every[1:]:
        for gpus in (chosen.node, max(chosen.gpus)):
            own, kept = (
                [
                    3600
                    * hours(setting, step_of(setting, inputs, chosen, gpus, c, cached=cached), 1)
                    for c in CASES
                ]
                for cached in (False, True)
            )
            fill = [3600 * fill_hours(setting, inputs, chosen, gpus, c) for c in CASES]
            moved, few = (
                [move_seconds(setting, inputs, chosen, gpus, row["top_k"], c) for c in CASES]
                for row in inputs["cache"]
            )
            even = [break_even(setting, inputs, chosen, gpus, c) for c in CASES]
            times = map(lasting, (fill, moved, few, own, kept))
            rows.append([setting.title, gpus, *times, span(even)])
    kept_classes = inputs["cache"][1]["top_k"]
    header = ["training", "GPUs", "to fill", "to move rows", f"of {kept_classes} classes"]
    header += ["an epoch with the teacher", "with the cache"]
    return table([*header, "pays from epoch"], rows)


def cache_bytes(inputs: Inputs, every: Sequence[Setting]) -> str:
    """Bytes of one variant of the teacher's outputs."""
    names = [row["top_k"] or row["classes"] for row in inputs["cache"]]
    header = ["training", *(f"{kept} of {inputs['cache'][0]['classes']} classes" for kept in names)]
    rows = [
        [setting.title, *(size(row["row_bytes"] * setting.pictures) for row in inputs["cache"])]
        for setting in every[1:]
    ]
    picture = ["a picture", *(f"{row['row_bytes']:,} B" for row in inputs["cache"])]
    return table(header, [picture, *rows])


def features(inputs: Inputs, setting: Setting) -> str:
    """What ORION's teacher hands over, if it were kept."""
    found = inputs["features"]
    rows = []
    for name, title in (("output", "the last block's map"), ("all", "all that the loss reads")):
        each = found[name]
        rows.append([title, size(each), size(each * setting.pictures)])
    return table(["kept in bf16", "a picture", "one variant of all"], rows)


def alone(inputs: Inputs, chosen: Assumptions, every: Sequence[Setting]) -> str:
    """The checkpoint, which one process writes while the others wait."""
    rows = []
    most = max(chosen.gpus)
    for setting in every:
        work = inputs["work"][setting.work]
        steps = [step_of(setting, inputs, chosen, most, case) for case in CASES]
        write = [checkpoint_seconds(work, chosen, case) for case in CASES]
        share = [100 * w / (SAVE_EVERY * s.seconds + w) for w, s in zip(write, steps, strict=True)]
        least = [99 * w / s.seconds for w, s in zip(write, steps, strict=True)]
        rows.append(
            [
                setting.title,
                size(12 * work["trained_params"]),
                lasting(write),
                span(share),
                span(least),
            ]
        )
    header = [
        "training",
        "checkpoint",
        "to write",
        f"% of the time on {most}, every {SAVE_EVERY} steps",
    ]
    return table([*header, "1 % if one comes every so many steps"], rows)


def order(inputs: Inputs) -> str:
    """The simulated epochs."""
    rows = []
    for row in inputs["simulations"]:
        parts = zip(row["worlds"], row["steps"], strict=True)
        rows.append(
            [
                row["name"],
                f"{row['pictures']:,}",
                f"{row['together']:,}",
                ", ".join(f"{steps:,} on {world}" for world, steps in parts),
                " to ".join(dict.fromkeys(f"{row[x]:,}" for x in ("fewest", "most"))),
                *(f"{row[name]:,}" for name in ("twice", "lost", "gained", "unread")),
            ]
        )
    header = ["pictures of", "number", "in a step", "steps", "by a rank", "read twice"]
    return table([*header, "lost by restarts", "gained", "left to other epochs"], rows)


def shards(inputs: Inputs) -> str:
    """The simulated fill of a cache."""
    row = inputs["cache_simulation"]
    told = {
        "pictures, in batches": f"{row['pictures']:,}, {row['batch']}",
        "batches of a rank, without a stop": f"{row['fewest']} to {row['most']}",
        "pictures that two ranks computed": row["twice"],
        "ranks, with a kill after each but the last": ", ".join(map(str, row["worlds"])),
        "shards after each kill": ", ".join(map(str, row["shards"])),
        "shards of another name than their rank's": row["misnamed"],
        "pictures computed again, as their shard was torn": f"{row['again']:,}",
        "pictures missing, rows of another picture": f"{row['missing']}, {row['wrong']}",
        "files that differ from those without a stop": row["different"],
    }
    return table([f"teacher cache of {row['name']}", "found"], [list(x) for x in told.items()])


def drawn(inputs: Inputs) -> str:
    """Cost of drawing an order in every process; of a billion pictures it is extrapolated."""
    last = inputs["order"][-1]
    grown = {"pictures": BILLION, "cpu_s": last["cpu_s"] * BILLION / last["pictures"]}
    rows = [
        [f"{row['pictures']:,}{more}", number(row["cpu_s"]), size(8 * row["pictures"])]
        for row, more in (*((row, "") for row in inputs["order"]), (grown, ", extrapolated"))
    ]
    return table(["pictures of an epoch", "CPU s to draw their order", "bytes of it"], rows)
