# SPDX-License-Identifier: Apache-2.0
"""The proofs of ``python -m bench.gpu``: tests, limits, goals, and the ops against others.

Runs tests/test_gpu.py and test_gpu_limits.py on the device, measures goals, determinism and memory,
times the ops against eager, SDPA, torch.compile, FlexAttention, flash-attn and whatever else is
installed, and writes gpu_NAME.json and gpu_NAME.md. Compiling their kernels would take the tests
too long in one process, so several share them.
"""

import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import plain
from bench.gpu_shard import NO_TIME
from bench.gpu_stages import Settings, environment, stage
from bench.gpu_tables import report
from bench.rows import read
from kdfast.machine.facts import machine_facts
from kdfast.ops._blocks import tables_in_use

# The limits want the device to themselves.
TESTS_FILE, LIMITS_FILE = "tests/test_gpu.py", "tests/test_gpu_limits.py"
# At most so many processes share the tests, with so many GiB of the device for each.
SHARDS, SHARD_GIB = 8, 2
# In the order of what they show, for when time runs out.
BENCHES = ("pruned_attention", "attention_distill", "kd_loss", "linear_kd_loss", "swiglu_norm")
BENCHES += ("feature_loss", "head_gather")
# Shares of the time that each may take; what is left is for the benches.
TESTS, LIMITS, PROBES = 0.36, 0.07, 0.27
# Seconds of samples of a candidate.
SAMPLES = 0.2
# Of its time, a stage begins nothing in the last tenth, so that it ends by itself.
BEGIN = 0.9
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def shards(dry: bool) -> int:
    """Processes that share the tests: as many as there are cores and memory of the device for."""
    if dry:
        return 2
    gib = torch.cuda.get_device_properties(0).total_memory >> 30
    return max(1, min(SHARDS, len(os.sched_getaffinity(0)), gib // SHARD_GIB))


def read_tests(paths: Iterable[Path]) -> dict[str, Any]:
    """Counts, and the names of what failed or was skipped with the first line of the reason."""
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["outcome"] == "passed":
                found["passed"] += 1
            else:
                found[row["outcome"]][row["name"]] = row["reason"]
    return found


def collected(folder: Path) -> dict[str, Any]:
    """What the stages have left behind so far; the rest is missing."""
    probes, rows = folder / "probes.json", folder / "rows.json"
    results: dict[str, Any] = {"tests": read_tests(sorted(folder.glob("tests_*.jsonl")))}
    if probes.exists():
        results |= json.loads(probes.read_text(encoding="utf-8"))
    if rows.exists():
        results |= read(rows)
    return results


class Report:
    """The two files of a run, written anew whenever there is more."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.started = time.monotonic()
        lacking = importlib.util.find_spec("pytest_benchmark") is None
        notes = [f"- block sizes of {name}: {text}" for name, text in tables_in_use()]
        notes += [f"- {plain.NOTE}"] if lacking else []
        self.facts = {"machine": machine_facts(), "dry_run": settings.dry, "notes": notes}
        self.stages: dict[str, Any] = {}

    def write(self, working: str = "") -> dict[str, Any]:
        """Writes what there is; ``working`` names the stage that has not ended."""
        results = self.facts | {"stages": self.stages} | collected(self.folder)
        results["seconds"] = round(time.monotonic() - self.started, 1)
        stopped = [f"stage {working}: had not ended when this was written"] if working else []
        results["failed"] = verdict(results) + stopped
        name = f"gpu_{self.settings.name}"
        self.settings.write(f"{name}.json", json.dumps(results, indent=1) + "\n")
        self.settings.write(f"{name}.md", report(results))
        return results


def run_stages(report: Report, seconds: float) -> None:
    """Runs all stages."""
    folder, dry = report.folder, report.settings.dry
    started = time.time()
    env = environment(dry)

    def run(name: str, commands: list[list[str]], limit: float) -> None:
        report.write(name)
        report.stages[name] = stage(name, commands, limit, env, partial(report.write, name))
        report.write()

    def shared(name: str | int) -> list[str]:
        return ["-p", "bench.gpu_shard", f"--results={folder / f'tests_{name}.jsonl'}"]

    def until(limit: float) -> str:
        return str(time.time() + BEGIN * limit)

    limit, count = TESTS * seconds, shards(dry)
    tests = [*PYTEST, TESTS_FILE, f"--until={until(limit)}"]
    run("tests", [[*tests, *shared(i), f"--shard={i}/{count}"] for i in range(count)], limit)
    run("limits", [[*PYTEST, LIMITS_FILE, *shared("limits")]], LIMITS * seconds)
    limit = PROBES * seconds
    probes = str(folder / "probes.json")
    run("probes", [["-m", "bench.gpu_probes", probes, until(limit)]], limit)
    limit = started + seconds - time.time()
    files = [f"bench/bench_{name}.py" for name in BENCHES]
    benches = [*PYTEST, *files, f"--rows={folder / 'rows.json'}", f"--budget={BEGIN * limit}"]
    benches.append("--in-turns")
    run("benches", [[*benches, f"--benchmark-max-time={SAMPLES}"]], limit)


def verdict(results: dict[str, Any]) -> list[str]:
    """What failed, in words; a time above a goal is reported, but no failure."""
    bad = [
        f"stage {name}: {stage['code']}"
        for name, stage in results["stages"].items()
        if stage["code"] != 0
    ]
    bad += [f"test {name}: {reason}" for name, reason in results["tests"]["failed"].items()]
    late = sum(reason == NO_TIME for reason in results["tests"]["skipped"].values())
    if late:
        bad.append(f"{late} tests were not run: {NO_TIME}")
    bad += [f"{part} is not complete: {NO_TIME}" for part in results.get("incomplete", [])]
    bad += [
        f"{row['call']}: {row['different']} of {row['runs']} runs differ"
        for row in results.get("determinism", [])
        if row["different"]
    ]
    return bad


def run(settings: Settings) -> int:
    """Runs everything and writes both files; 1 if something failed."""
    with tempfile.TemporaryDirectory() as folder:
        made = Report(settings, Path(folder))
        run_stages(made, settings.left)
        results = made.write()
    print(report(results))
    print(f"wrote {settings.out / f'gpu_{settings.name}.json'} and .md")
    return bool(results["failed"])
