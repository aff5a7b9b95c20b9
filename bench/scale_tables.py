# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/scale.md, of measured inputs and assumptions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.gpu_tables import table
from bench.rows import facts_line
from bench.scale_model import (
    CASES,
    FAST,
    SAVE_EVERY,
    SLOW,
    Inputs,
    Step,
    break_even,
    checkpoint_seconds,
    efficiency,
    fill_hours,
    hours,
    reduce_seconds,
    sgd_bytes,
    step_of,
    steps_of,
    stops,
)
from bench.scale_settings import BILLION, Assumptions, Setting, settings, shown

# A number of GPUs at which tables that have no column for it are.
MANY = 64
NAMES = {"orion50": "`orion50`", "vit_l_to_s": "ViT-L -> ViT-S"}


def blocks(inputs: Inputs, chosen: Assumptions) -> dict[str, str]:
    """The generated parts of the page by name."""
    every = settings(chosen)
    machine = inputs["machine"]
    return {
        "scale machine": f"{facts_line(machine)}, by `{machine['command']}`.",
        "scale assumptions": assumptions(chosen),
        "scale work": work(inputs),
        "scale memory": memory(inputs),
        "scale pictures": pictures(inputs, chosen, every),
        **{f"scale {s.key}": timed(s, inputs, chosen) for s in every},
        "scale epochs": epochs(inputs, chosen, every),
        "scale stops": stopping(inputs, chosen, every),
        "scale bytes": sent(inputs, chosen),
        "scale cache": cached(inputs, chosen, every),
        "scale features": features(inputs, every[0]),
        "scale alone": alone(inputs, chosen, every),
        "scale order": order(inputs),
        "scale drawn": drawn(inputs),
    }


def span(values: Sequence[float], digits: int = 2) -> str:
    """The slow and the fast case, as "12 to 5"; one number where they are the same."""
    texts = list(dict.fromkeys(number(x, digits) for x in values))
    return " to ".join(texts)


def number(value: float, digits: int = 2) -> str:
    """A number to some digits, without exponents."""
    if math.isinf(value):
        return "never"
    if value == 0 or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


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
        one = [step_of(setting, inputs, chosen, chosen.node, case) for case in CASES]
        asked = [step.batch / (step.compute + step.exposed) for step in one]
        cores = [rate * data["cpu_ms"] / 1e3 for rate in asked]
        rows.append(
            [
                setting.title,
                " x ".join(map(str, reversed(data["sides"]))),
                size(data["file_bytes"]),
                number(data["cpu_ms"], 3),
                number(1e3 / data["cpu_ms"], 3),
                span(asked),
                span(cores),
                size(asked[FAST] * data["file_bytes"] * 512),
            ]
        )
    header = ["training", "files", "bytes each", "CPU ms", "pictures/s of a core"]
    header += ["pictures/s that a GPU asks for", "cores that it needs"]
    return table([*header, "read a second by 512"], rows)


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
            "all-reduce, fp32 (DDP)": 4 * params,
            "all-reduce, bf16 hook": 2 * params,
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


def cached(inputs: Inputs, chosen: Assumptions, every: Sequence[Setting]) -> str:
    """The teacher's outputs on disk instead of the teacher."""
    rows = []
    for setting in every[1:]:
        each = [row["row_bytes"] * setting.pictures for row in inputs["cache"]]
        for gpus in (chosen.node, max(chosen.gpus)):
            own, kept = (
                [
                    hours(setting, step_of(setting, inputs, chosen, gpus, c, cached=cached), 1)
                    for c in CASES
                ]
                for cached in (False, True)
            )
            fill = [fill_hours(setting, inputs, chosen, gpus, c) for c in CASES]
            even = [break_even(setting, inputs, chosen, gpus, c) for c in CASES]
            times = map(span, (fill, own, kept, even))
            rows.append([setting.title, *map(size, each), gpus, *times])
    kept = inputs["cache"][1]["top_k"]
    header = ["training", f"{inputs['cache'][0]['classes']} classes", f"{kept} classes", "GPUs"]
    header += ["hours to fill", "an epoch with the teacher", "with the cache"]
    return table([*header, "pays from epoch"], rows)


def features(inputs: Inputs, setting: Setting) -> str:
    """What ORION's teacher hands over, if it were kept."""
    found = inputs["features"]
    rows = []
    for name, title in (("output", "the last block's map"), ("all", "all that the loss reads")):
        each = found[name]
        rows.append([title, size(each), size(each * setting.pictures)])
    return table(["kept in bf16", "a picture", "one variant of all"], rows)


def alone(inputs: Inputs, chosen: Assumptions, every: Sequence[Setting]) -> str:
    """What one process does while the others wait, beside the same done by all."""
    rows = []
    most = max(chosen.gpus)
    for setting in every:
        work = inputs["work"][setting.work]
        steps = [step_of(setting, inputs, chosen, most, case) for case in CASES]
        write = [checkpoint_seconds(work, chosen, case) for case in CASES]
        share = [
            100 * w / (SAVE_EVERY * s.seconds + w) for w, s in zip(write, steps, strict=True)
        ]
        least = [99 * w / s.seconds for w, s in zip(write, steps, strict=True)]
        fill = [
            span([fill_hours(setting, inputs, chosen, n, case) for case in CASES])
            for n in (1, most)
        ]
        if "step_cached" not in work:
            fill = ["", ""]
        rows.append(
            [
                setting.title,
                size(12 * work["trained_params"]),
                span(write),
                span(share) + " %",
                span(least),
                *fill,
            ]
        )
    header = ["training", "checkpoint", "s to write", f"of the time, every {SAVE_EVERY} steps"]
    header += ["1 % at every", "hours of a cache by 1", f"by {most}"]
    return table(header, rows)


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


def drawn(inputs: Inputs) -> str:
    """Cost of drawing an order in every process; of a billion pictures it is extrapolated."""
    last = inputs["order"][-1]
    grown = {"pictures": BILLION, "cpu_s": last["cpu_s"] * BILLION / last["pictures"]}
    rows = [
        [f"{row['pictures']:,}", number(row["cpu_s"]), size(8 * row["pictures"])]
        for row in (*inputs["order"], grown)
    ]
    return table(["pictures of an epoch", "CPU s to draw their order", "bytes of it"], rows)

