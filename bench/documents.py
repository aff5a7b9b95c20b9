# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.documents``: writes the tables of README.md and of two pages of docs/internals.

The pages are benchmarks.md and gpu.md. What stands between ``<!-- NAME -->`` and ``<!-- end -->``
comes from bench/results/zen4.json, for whole models from zen4_models.json, for GPUs from
gpu_static.json.
"""

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_tables import ROOT, arch_name, kernels
from bench.gpu_tables import table as markdown
from bench.report import OURS, best_other, headline
from bench.report import table as all_rows

RESULTS = ROOT / "bench" / "results" / "zen4.json"
GPU_RESULTS = RESULTS.with_stem("gpu_static")
MODEL_RESULTS = RESULTS.with_stem("zen4_models")
# Whole models have tables of their own.
MODELS = ("accelerate", "vit_chain")
Group = dict[str, dict[str, Any]]


def grouped(results: dict[str, Any]) -> dict[tuple[str, str], Group]:
    """The rows of every comparison by candidate; cases without "torch."."""
    groups: dict[tuple[str, str], Group] = {}
    for row in results["rows"]:
        key = row["op"], row["case"].replace("torch.", "")
        groups.setdefault(key, {})[row["candidate"]] = row
    return groups


def ratio(group: Group) -> float | None:
    """Time of the fastest rival over ours."""
    rival = best_other(group.values())
    return rival["ms"] / group[OURS]["ms"] if rival and OURS in group else None


def only(results: dict[str, Any], keep: Callable[[str, str], bool]) -> dict[str, Any]:
    """The results with the rows of some comparisons."""
    rows = [r for r in results["rows"] if keep(r["op"], r["case"].replace("torch.", ""))]
    return {**results, "rows": rows}


def both(results: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """The rows of ops, and those of whole models from their own file."""
    ops = only(results, lambda op, case: op not in MODELS)
    return {**results, "rows": ops["rows"] + whole["rows"]}


def rated(results: dict[str, Any], whole: dict[str, Any]) -> dict[str, list[float]]:
    """By op: the ratio of every comparison that has a rival."""
    ratios: dict[str, list[float]] = {}
    for (op, _), group in grouped(both(results, whole)).items():
        if (value := ratio(group)) is not None:
            ratios.setdefault(op, []).append(value)
    return ratios


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


def weighted(results: dict[str, Any]) -> str:
    """Losses with an upstream gradient other than 1."""
    rows = []
    for (op, case), group in grouped(results).items():
        ours, rival = group.get("kdfast, weight"), best_other(group.values())
        if ours and rival:
            times = f"{ours['ms']:.2f}", f"{rival['ms']:.2f}"
            rows.append([op, case, *times, f"{rival['ms'] / ours['ms']:.2f}"])
    return markdown(["op", "case", "kdfast ms, weighted", "best other ms", "ratio"], rows)


def yardsticks(results: dict[str, Any]) -> str:
    """Our time against other calls of ours."""
    rows = []
    yards = {
        "kdfast, no rope": "RoPE in the kernel over none",
        "native half": "half of the heads by index over those heads alone",
        "all": "half of the heads by index over all heads",
        "attention only": "attention KL on top of attention",
        "kdfast, 16 heads": "8 heads over 16",
    }
    for (_, case), group in grouped(results).items():
        for name, what in yards.items():
            if name in group and OURS in group:
                change = group[OURS]["ms"] / group[name]["ms"] - 1
                rows.append([what, case, f"{100 * change:+.0f} %"])
    return markdown(["what", "case", "time"], rows)


def peaks(results: dict[str, Any]) -> str:
    """Extra memory at the peak of every comparison that measured it, in MiB."""
    names = (OURS, "eager", "sdpa", "compile")
    rows = []
    for (op, case), group in grouped(results).items():
        if OURS in group and group[OURS]["peak_bytes"] is not None:
            peak = (group[n]["peak_bytes"] if n in group else None for n in names)
            rows.append([op, case, *("" if x is None else f"{x / 2**20:.1f}" for x in peak)])
    return markdown(["op", "case", *names], rows)


def models(results: dict[str, Any]) -> str:
    """Whole models before and after ``kdfast.accelerate``, and with half of the heads."""
    rows = []
    for (op, case), group in grouped(results).items():
        if op != "accelerate":
            continue
        names = ("sdpa", "compile", OURS, "kdfast, half of the heads")
        times = (f"{group[n]['ms']:.0f}" if n in group else "" for n in names)
        value = ratio(group)
        rows.append([case, *times, "" if value is None else f"{value:.2f}"])
    header = ["model", "original (SDPA), ms", "torch.compile", "kdfast", "half of the heads"]
    return markdown([*header, "ratio"], rows)


def chain(results: dict[str, Any]) -> str:
    """Steps and evaluations of the ViT chain."""
    rows = []
    for (op, case), group in grouped(results).items():
        if op == "vit_chain":
            names = ("timm", OURS, "kdfast, cache")
            rows.append([case, *(f"{group[n]['ms']:.0f}" if n in group else "" for n in names)])
    return markdown(["link", "timm + torch KD, ms", "kdfast", "kdfast, teacher cache"], rows)


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


def wrapped(text: str) -> str:
    """Prose in lines of at most 100 characters."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def blocks(results: dict[str, Any], whole: dict[str, Any], gpu: dict[str, Any]) -> dict[str, str]:
    """The generated blocks of the documents by name, from rows of ops, whole models and GPUs."""
    ops = only(results, lambda op, case: op not in MODELS)
    lost = [
        f"- `{op}` {case}: {value:.2f}"
        for (op, case), group in grouped(both(results, whole)).items()
        if (value := ratio(group)) is not None and value < 1
    ]
    skipped = "\n".join(f"- {line}" for line in results["left_out"])
    return {
        "machine": headline(results) + ".",
        "models machine": headline(whole) + ".",
        "span": span(rated(results, whole)),
        "slower": "\n".join(lost) or "None.",
        "ops": all_rows(ops) + (f"\n\nNot timed:\n\n{skipped}" if skipped else ""),
        "weighted": weighted(results),
        "yardsticks": yardsticks(results),
        "peaks": peaks(results),
        "models": models(whole),
        "chain": chain(results),
        "binaries": binaries(gpu),
    }


def committed() -> dict[str, str]:
    """The blocks of the committed result files."""
    files = (RESULTS, MODEL_RESULTS, GPU_RESULTS)
    return blocks(*(json.loads(path.read_text(encoding="utf-8")) for path in files))


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
    return ROOT / "README.md", internals / "benchmarks.md", internals / "gpu.md"


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
