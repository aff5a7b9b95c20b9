# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu``: every proof that needs a GPU, in one command of at most ten minutes.

Runs tests/test_gpu.py and test_gpu_limits.py on the device, measures goals, determinism and memory,
times the ops against eager, SDPA, torch.compile, FlexAttention and flash-attn, and writes
gpu_NAME.json and gpu_NAME.md. Compiling their kernels would take the tests too long in one process,
so several share them.
``--dry-run`` does the same, small, on a CPU with the Triton kernels in the interpreter.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch

from bench.gpu_shard import NO_TIME
from bench.gpu_tables import report
from bench.rows import read
from kdfast.machine.facts import machine_facts

ROOT = Path(__file__).resolve().parents[1]
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


def stage(name: str, commands: list[list[str]], seconds: float, dry: bool) -> dict[str, Any]:
    """Runs the processes of one stage at once; the first code that is not 0, and the time.

    The output of one process is shown as it comes, that of several at their end.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if dry:
        env |= {"KDFAST_DRY_RUN": "1", "TRITON_INTERPRET": "1"}
    print(f"== {name}", flush=True)
    started = time.monotonic()
    with ExitStack() as stack:
        several = len(commands) > 1
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        running = [
            subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=env, **(captured(file) if several else {})
            )
            for command, file in zip(commands, files, strict=True)
        ]
        codes = [ended(process, started + seconds) for process in running]
        for file in files:
            file.seek(0)
            print(file.read(), end="", flush=True)
    code = next((code for code in codes if code), 0)
    return {"code": code, "seconds": round(time.monotonic() - started, 1)}


def captured(file: IO[str]) -> dict[str, Any]:
    """Where both outputs of a process go."""
    return {"stdout": file, "stderr": subprocess.STDOUT}


def ended(process: subprocess.Popen[bytes], until: float) -> int | str:
    """The code of a process, which is killed if it has not ended by then."""
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "stopped: no time left"


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
        for case in ElementTree.parse(path).iter("testcase"):
            outcome = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
            if outcome is None:
                found["passed"] += 1
                continue
            kind = "skipped" if outcome.tag == "skipped" else "failed"
            reason = (outcome.get("message") or "").splitlines()
            found[kind][case.get("name", "?")] = reason[0] if reason else ""
    return found


def run_stages(folder: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Results of all stages; what a stage did not leave behind is missing from them."""
    started = time.time()
    probes, rows = folder / "probes.json", folder / "rows.json"
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    stages = {}

    def run(name: str, commands: list[list[str]], limit: float) -> None:
        stages[name] = stage(name, commands, limit, dry)

    def junit(name: str | int) -> str:
        return f"--junitxml={folder / f'tests_{name}.xml'}"

    def until(limit: float) -> str:
        return str(time.time() + BEGIN * limit)

    limit, count = TESTS * seconds, shards(dry)
    tests = [*pytest, "-p", "bench.gpu_shard", TESTS_FILE, f"--until={until(limit)}"]
    run("tests", [[*tests, f"--shard={i}/{count}", junit(i)] for i in range(count)], limit)
    run("limits", [[*pytest, LIMITS_FILE, junit("limits")]], LIMITS * seconds)
    limit = PROBES * seconds
    run("probes", [["-m", "bench.gpu_probes", str(probes), until(limit)]], limit)
    limit = started + seconds - time.time()
    files = [f"bench/bench_{name}.py" for name in BENCHES]
    benches = [*pytest, *files, f"--benchmark-json={rows}", f"--budget={BEGIN * limit}"]
    run("benches", [[*benches, f"--benchmark-max-time={SAMPLES}"]], limit)
    results = {"stages": stages, "tests": read_tests(sorted(folder.glob("tests_*.xml")))}
    if probes.exists():
        results |= json.loads(probes.read_text(encoding="utf-8"))
    if rows.exists():
        results |= read(rows)
    return results


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


def main() -> int:
    """Runs everything and writes both files; 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in the interpreter")
    parser.add_argument("--out", type=Path, help="folder of the two files [bench/results]")
    parser.add_argument("--seconds", type=float, default=570, help="time limit of the whole")
    args = parser.parse_args()
    if not (args.dry_run or torch.cuda.is_available()):
        print("bench.gpu: no CUDA device; --dry-run tries the command without one", file=sys.stderr)
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = run_stages(Path(folder), args.seconds, args.dry_run)
        results = {"machine": machine_facts(), "dry_run": args.dry_run} | results
    results["seconds"] = round(time.monotonic() - started, 1)
    results["failed"] = verdict(results)
    name = "dry_run" if args.dry_run else re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    out = args.out or (Path(tempfile.mkdtemp()) if args.dry_run else ROOT / "bench" / "results")
    out.mkdir(parents=True, exist_ok=True)
    text = report(results)
    (out / f"gpu_{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / f"gpu_{name}.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"wrote {out / f'gpu_{name}.json'} and .md")
    return bool(results["failed"])


if __name__ == "__main__":
    sys.exit(main())
