# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.documents``: writes the tables of README.md and of four pages of docs.

The pages are benchmarks.md, gpu.md, orion_training.md and compatibility.md. What stands between
``<!-- NAME -->`` and ``<!-- end -->`` comes from the result files of bench/results: FAMILY.json for
the ops, FAMILY_models.json for whole models and FAMILY_orion.json for bench_orion, in full of the
machine SHOWN, the medians of all; FAMILY_rivals.json of ``bench.rivals``, the newest in README.md;
for GPUs from gpu_static.json; for releases of torch from torch_VERSION.json, which ``make
test-torch`` writes.
"""

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.bench_orion import KEPT, UNITS
from bench.gpu_tables import ROOT, arch_name, kernels
from bench.gpu_tables import table as markdown
from bench.report import OURS, best_other
from bench.report import table as all_rows
from bench.rows import facts_line, skipped_lines
from kdfast.models import eva_vit_l_orion
from kdfast.pruning import pruning_report

RESULTS = ROOT / "bench" / "results"
# The machine that is shown in full: the one whose files are newest and most complete.
SHOWN = "zen4"
# How a test's reason begins that an old torch or triton keeps from running.
LACKING = ("torch ", "triton ")
# Whole models have tables of their own.
MODELS = ("accelerate", "vit_chain")
Group = dict[str, dict[str, Any]]


class Machine(NamedTuple):
    """What was measured on a family of processors, or on a GPU.

    Attributes:
        ops: The result file of the ops.
        whole: That of whole models; both are the same if there is only one.
        orion: That of ORION's models, or None.
    """

    ops: dict[str, Any]
    whole: dict[str, Any]
    orion: dict[str, Any] | None = None


def machines() -> dict[str, Machine]:
    """The machines that have a file, by its name without "_models" and "_orion"."""
    every = {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")}
    files = {name: file for name, file in every.items() if "skipped" in file}  # by bench.rows
    found = {}
    for name in sorted({name.removesuffix("_models").removesuffix("_orion") for name in files}):
        ops, whole, orion = (files.get(f"{name}{part}") for part in ("", "_models", "_orion"))
        if ops or whole:
            found[name] = Machine(ops or whole, whole or ops, orion)
    return found


def grouped(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Group]:
    """The rows of every comparison by candidate."""
    groups: dict[tuple[str, str], Group] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"]), {})[row["candidate"]] = row
    return groups


def ratio(group: Group) -> float | None:
    """Time of the fastest rival over ours."""
    rival = best_other(group.values())
    return rival["ms"] / group[OURS]["ms"] if rival and OURS in group else None


def ops_rows(machine: Machine) -> list[dict[str, Any]]:
    """The rows of ops; of one that was timed again, with whole models or ORION's, those."""
    rows: list[dict[str, Any]] = []
    for file in (machine.ops, machine.whole, machine.orion):
        newer = [row for row in file["rows"] if row["op"] not in MODELS] if file else []
        again = {row["op"] for row in newer}
        rows = [*(row for row in rows if row["op"] not in again), *newer]
    return rows


def model_rows(machine: Machine) -> list[dict[str, Any]]:
    """The rows of whole models before and after ``kdfast.accelerate``."""
    return [row for row in machine.whole["rows"] if row["op"] == "accelerate"]


def rated(machine: Machine) -> dict[str, list[float]]:
    """By op: the ratio of every comparison that has a rival."""
    ratios: dict[str, list[float]] = {}
    for (op, _), group in grouped(ops_rows(machine) + model_rows(machine)).items():
        if (value := ratio(group)) is not None:
            ratios.setdefault(op, []).append(value)
    return ratios


def side_by_side(every: Iterable[Machine]) -> str:
    """By op: the median ratio on every machine."""
    found = {facts_line(m.ops["machine"]): rated(m) for m in every}
    ops = dict.fromkeys(op for ratios in found.values() for op in ratios)
    columns = [line.partition(",")[0] for line in found]
    rows = [
        [op, *(f"{statistics.median(x[op]):.2f}" if op in x else "" for x in found.values())]
        for op in ops
    ]
    return "\n".join([markdown(["op", *columns], rows), "", *(f"- {line}" for line in found)])


def rates(results: dict[str, Any]) -> str:
    """The rates that limits come from."""
    if not results["rates"]:
        return "The rates were not measured, so products have no limit in this file."
    return markdown(
        ["dtype", "limit, GFLOP/s", "best library"],
        [
            [dtype, *(f"{rate[key] / 1e9:.0f}" for key in ("limit", "library"))]
            for dtype, rate in results["rates"].items()
        ],
    )


def span(ratios: dict[str, list[float]]) -> str:
    """By op: how many comparisons, and the lowest, median and highest ratio."""
    header = ["op", "comparisons", "lowest ratio", "median", "highest"]
    return markdown(
        header,
        [
            [op, len(x), *(f"{f(x):.2f}" for f in (min, statistics.median, max))]
            for op, x in ratios.items()
        ],
    )


def weighted(ops: Iterable[dict[str, Any]]) -> str:
    """Losses with an upstream gradient other than 1."""
    rows = []
    for (op, case), group in grouped(ops).items():
        ours, rival = group.get("kdfast, weight"), best_other(group.values())
        if ours and rival:
            times = f"{ours['ms']:.2f}", f"{rival['ms']:.2f}"
            rows.append([op, case, *times, f"{rival['ms'] / ours['ms']:.2f}"])
    return markdown(["op", "case", "kdfast ms, weighted", "best other ms", "ratio"], rows)


def yardsticks(ops: Iterable[dict[str, Any]]) -> str:
    """Our time against other calls of ours."""
    rows = []
    yards = {
        "kdfast, no rope": "RoPE in the kernel over none",
        "native half": "half of the heads by index over those heads alone",
        "all": "half of the heads by index over all heads",
        "attention only": "attention KL on top of attention",
        "kdfast, 16 heads": "8 heads over 16",
    }
    for (_, case), group in grouped(ops).items():
        for name, what in yards.items():
            if name in group and OURS in group:
                change = group[OURS]["ms"] / group[name]["ms"] - 1
                rows.append([what, case, f"{100 * change:+.0f} %"])
    return markdown(["what", "case", "time"], rows)


def peaks(ops: Iterable[dict[str, Any]]) -> str:
    """Extra memory at the peak of every comparison that measured it, in MiB."""
    names = (OURS, "eager", "sdpa", "compile")
    rows = []
    for (op, case), group in grouped(ops).items():
        if "peak_bytes" in group.get(OURS, ()):
            peak = (group[n].get("peak_bytes") if n in group else None for n in names)
            rows.append([op, case, *("" if x is None else f"{x / 2**20:.1f}" for x in peak)])
    return markdown(["op", "case", *names], rows)


def models(whole: Sequence[dict[str, Any]]) -> str:
    """Whole models: the candidates in the order of the file, ours last, and the ratio."""
    titles = {
        "sdpa": "original (SDPA)",
        "compile": "torch.compile",
        "freezing": "compile, freezing",
        "onnx": "ONNX Runtime",
        "openvino": "OpenVINO",
    }
    every = dict.fromkeys(row["candidate"] for row in whole)
    names = sorted(every, key=lambda name: name.startswith(OURS))
    rows = []
    for (_, case), group in grouped(whole).items():
        times = (f"{group[n]['ms']:.0f}" if n in group else "" for n in names)
        value = ratio(group)
        rows.append([case, *times, "" if value is None else f"{value:.2f}"])
    return markdown(["model, ms", *(titles.get(n, n) for n in names), "ratio"], rows)


def at_best(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Whole models of one image and training steps in fp32: ms of torch at its best and of ours."""
    times = {}
    for (_, case), group in grouped(rows).items():
        if OURS not in group or "bf16" in case or ("fwd " in case and "batch 1" not in case):
            continue
        best = min(group[n]["ms"] for n in ("eager", "compile", "freezing") if n in group)
        # Without the count of multiply-adds.
        times[case.partition(", ")[0]] = best, group[OURS]["ms"]
    return times


def whole(every: Sequence[Machine]) -> str:
    """What every machine knows of whole models: torch at its best, kdfast and the gain."""
    known = [(m.whole["machine"], found) for m in every if (found := at_best(model_rows(m)))]
    columns = [f"{m['family']}: {x}" for m, _ in known for x in ("PyTorch", "kdfast", "gain")]
    table = []
    for case in dict.fromkeys(case for _, found in known for case in found):
        row = [case]
        for _, found in known:
            best, ours = found.get(case, (None, None))
            missing = best is None or ours is None
            row += [""] * 3 if missing else [f"{best:.0f}", f"{ours:.0f}", f"{best / ours:.2f}"]
        table.append(row)
    facts = "; ".join(facts_line(machine) for machine, _ in known)
    return f"{wrapped(facts + '.')}\n\n" + markdown(["ms", *columns], table)


def rivals(found: dict[str, Any]) -> str:
    """Whole models by ``kdfast.compare``, which gives each candidate a process of its own."""
    names = ("eager", "onnx", "openvino", OURS, "eager-bf16", "openvino-bf16", f"{OURS}-bf16")
    table = []
    for model, rows in found["models"].items():
        times = {row["name"]: row.get("ms") for row in rows}
        table.append([model, *(f"{times[n]:.0f}" if times.get(n) else "" for n in names)])
    header = ("eager", "ONNX Runtime", "OpenVINO", "kdfast", "eager bf16", "OpenVINO bf16")
    facts = facts_line(found["machine"])
    return f"{facts}.\n\n" + markdown(["ms", *header, "kdfast bf16"], table)


def orion(found: dict[str, Any]) -> str:
    """ORION's backbone and what pruning leaves of it: size, work, time and memory of one image."""
    with torch.device("meta"):
        whole = eva_vit_l_orion()
        halves = (eva_vit_l_orion(heads=KEPT), eva_vit_l_orion(heads=KEPT, mlp_hidden=UNITS))
    models = {
        "eager, 16 heads": ("as ORION computes it, 16 heads", whole),
        "kdfast, 16 heads": ("kdfast, 16 heads", whole),
        OURS: ("kdfast, 8 heads", halves[0]),
        "kdfast, half of units too": ("kdfast, 8 heads and half of the units", halves[1]),
    }
    cases = {case: group for (_, case), group in grouped(found["rows"]).items()}
    single, half = (
        cases[f"fwd, 8 heads, 24 of 24 blocks {dtype}"] for dtype in ("float32", "bfloat16")
    )
    rows = []
    for candidate, (title, model) in models.items():
        cost = pruning_report(model, ())
        flops = cost.full.flops_padded if candidate.startswith("eager") else cost.full.flops
        times = [single[candidate], half[candidate]]
        rows.append(
            [
                title,
                f"{cost.full.params / 1e6:.1f}M",
                f"{flops / 2e9:.0f}",
                *(f"{row['ms']:.0f}" for row in times),
                f"{single['eager, 16 heads']['ms'] / times[0]['ms']:.2f}",
                *(f"{row['peak_bytes'] / 2**20:.0f}" for row in times),
            ]
        )
    header = ["backbone", "parameters", "GMACs", "ms fp32", "ms bf16", "gain, fp32"]
    header += ["MiB fp32", "MiB bf16"]
    steps = []
    for (_, case), group in grouped(found["rows"]).items():
        if "24 of 24 blocks" in case and "step" in case or "frame" in case:
            ours, eager = group[OURS], group["eager"]
            memory = (f"{row['peak_bytes'] / 2**30:.1f}" for row in (eager, ours))
            times = (f"{row['ms'] / 1e3:.1f}" for row in (eager, ours))
            steps.append([case, *times, f"{eager['ms'] / ours['ms']:.2f}", *memory])
    second = ["what", "eager, s", "kdfast, s", "gain", "eager, GiB", "kdfast, GiB"]
    facts = facts_line(found["machine"])
    return "\n\n".join([f"{facts}.", markdown(header, rows), markdown(second, steps)])


def chain(steps: Iterable[dict[str, Any]]) -> str:
    """Steps and evaluations of the ViT chain."""
    names = ("timm", OURS, "kdfast, cache")
    rows = [
        [case, *(f"{group[n]['ms']:.0f}" if n in group else "" for n in names)]
        for (_, case), group in grouped(steps).items()
    ]
    return markdown(["link", "timm + torch KD, ms", "kdfast", "kdfast, teacher cache"], rows)


def releases(found: Iterable[dict[str, Any]]) -> str:
    """What passed under each release of torch, oldest first, and what an old one lacks."""
    rows, lacks = [], []
    for file in sorted(found, key=lambda file: release(file["machine"]["torch"])):
        machine, packages, tests = file["machine"], file["packages"], file["tests"]
        versions = [packages[n] or "none" for n in ("triton", "numpy", "transformers")]
        skipped = sum(tests["skipped"].values())
        counts = [tests["passed"], skipped, len(tests["failed"])]
        when = [machine["commit"], machine["date"]]
        rows.append([machine["torch"], *versions, machine["python"], *counts, *when])
        lacks += [
            wrapped(f"- {reason}: {count} test{'s' * (count > 1)}", "  ")
            for reason, count in tests["skipped"].items()
            if reason.startswith(LACKING)
        ]
        for run in tests.get("again", []):
            count = len(run["tests"])
            note = f"- torch {machine['torch']}: {count} of the tests ran again, mended, at commit "
            lacks.append(wrapped(f"{note}{run['commit']}", "  "))
        lacks += [
            wrapped(f"- torch {machine['torch']} fails `{name}`", "  ") for name in tests["failed"]
        ]
    header = ["torch", "triton", "NumPy", "transformers", "Python", "passed", "skipped", "failed"]
    return "\n".join([markdown([*header, "commit", "date"], rows), "", *(dict.fromkeys(lacks))])


def release(version: str) -> list[int]:
    """The numbers of a version, to sort by."""
    return [int(x) for x in version.partition("+")[0].split(".")]


def binaries(facts: dict[str, Any]) -> str:
    """How many kernels are compiled ahead of time, and what they keep to."""
    every = [k for k in kernels(facts) if arch_name(k["arch"]).startswith("sm_")]
    names = ", ".join(arch_name(arch) for arch in sorted({k["arch"] for k in every}))
    return wrapped(
        f"{len(every)} kernels are compiled ahead of time for {names}: at most "
        f"{max(k['spill_bytes'] for k in every)} bytes of registers spilled, and "
        f"{len(facts['violations']) or 'none'} of them against a rule of this page (spills, shared "
        "memory, tensor cores, 16-byte loads)."
    )


def wrapped(text: str, indent: str = "") -> str:
    """Prose in lines of at most 100 characters, all but the first behind ``indent``."""
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def blocks(shown: Machine, every: Sequence[Machine], gpu: dict[str, Any]) -> dict[str, str]:
    """The generated blocks of the documents by name."""
    ops, every_model = ops_rows(shown), model_rows(shown)
    lost = [
        f"- `{op}` {case}: {value:.2f}"
        for (op, case), group in grouped(ops + every_model).items()
        if (value := ratio(group)) is not None and value < 1
    ]
    skipped = skipped_lines(shown.ops)
    return {
        "machine": facts_line(shown.ops["machine"]) + ".",
        "models machine": facts_line(shown.whole["machine"]) + ".",
        "machines": side_by_side(every),
        "rates": rates(shown.ops),
        "span": span(rated(shown)),
        "slower": "\n".join(lost) or "None.",
        "ops": all_rows(ops) + (f"\n\nNot timed:\n\n{skipped}" if skipped else ""),
        "weighted": weighted(ops),
        "yardsticks": yardsticks(ops),
        "peaks": peaks(ops),
        "models": models(every_model),
        "models elsewhere": "\n\n".join(
            f"{wrapped(facts_line(m.whole['machine']) + '.')}\n\n{models(rows)}"
            for m in every
            if m is not shown and (rows := model_rows(m))
        ),
        "whole": whole(every),
        "chain": chain(row for row in shown.ops["rows"] if row["op"] == "vit_chain"),
        "binaries": binaries(gpu),
    }


def committed() -> dict[str, str]:
    """The blocks of the committed result files."""
    every = machines()
    gpu = json.loads((RESULTS / "gpu_static.json").read_text(encoding="utf-8"))
    raced = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*_rivals.json"))]
    contents = blocks(every[SHOWN], list(every.values()), gpu)
    shown = every[SHOWN].orion
    tested = [json.loads(path.read_text("utf-8")) for path in RESULTS.glob("torch_*.json")]
    return {
        **contents,
        "rivals": rivals(max(raced, key=lambda found: str(found["machine"]["date"]))),
        "rivals of all": "\n\n".join(map(rivals, raced)),
        "orion": "" if shown is None else orion(shown),
        "releases": releases(tested),
    }


def filled(text: str, contents: dict[str, str]) -> str:
    """The document with the blocks it names replaced.

    Raises:
        ValueError: A named block does not end.
    """
    for name, content in contents.items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found:
            continue
        _, ended, after = rest.partition(end)
        if not ended:
            raise ValueError(f"document: {begin} must be followed by {end}, got no end")
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def documents() -> Iterable[Path]:
    """The documents that hold generated blocks."""
    internals = ROOT / "docs" / "internals"
    use = ROOT / "docs" / "use"
    pages = use / "orion_training.md", use / "compatibility.md"
    return ROOT / "README.md", internals / "benchmarks.md", internals / "gpu.md", *pages


def main(argv: Sequence[str]) -> int:
    """Rewrites the generated blocks of all documents, and prints which of them changed."""
    argparse.ArgumentParser(prog="python -m bench.documents", description=__doc__).parse_args(argv)
    contents = committed()
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = filled(before, contents)
        print(f"{path}: {'as it was' if after == before else 'written'}")
        if after != before:
            path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
