# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu``: every proof that needs a GPU, in one command of at most ten minutes.

Runs tests/test_gpu.py and test_gpu_limits.py on the device, measures goals, determinism and memory,
times the ops against eager, SDPA, torch.compile, FlexAttention and flash-attn, and writes
gpu_NAME.json and gpu_NAME.md.
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
from pathlib import Path
from typing import Any

import torch

from bench.gpu_tables import report
from kdfast.benchmark import machine_facts

ROOT = Path(__file__).resolve().parents[1]
TEST_FILES = ("tests/test_gpu.py", "tests/test_gpu_limits.py")
# In the order of what they show, for when time runs out.
BENCHES = ("pruned_attention", "attention_distill", "kd_loss", "linear_kd_loss", "swiglu_norm")
BENCHES += ("feature_loss", "head_gather")
# Shares of the time: tests, goals and the like, benches; the rest is for starting up.
TESTS, PROBES, TIMINGS = 0.4, 0.15, 0.4


def stage(name: str, command: list[str], seconds: float, dry: bool) -> dict[str, Any]:
    """Runs one stage in a process of its own and prints its output; its code and time."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if dry:
        env |= {"KDFAST_DRY_RUN": "1", "TRITON_INTERPRET": "1"}
    print(f"== {name}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=env, check=False, timeout=seconds
        )
        code: int | str = done.returncode
    except subprocess.TimeoutExpired:
        code = f"stopped after {seconds:.0f} s"
    return {"code": code, "seconds": round(time.monotonic() - started, 1)}


def read_tests(path: Path) -> dict[str, Any]:
    """Counts, and the names of what failed or was skipped with the first line of the reason."""
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    if not path.exists():
        return found
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            found["passed"] += 1
        else:
            kind = "skipped" if outcome.tag == "skipped" else "failed"
            reason = (outcome.get("message") or "").splitlines()
            found[kind][case.get("name", "?")] = reason[0] if reason else ""
    return found


def run_stages(folder: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Results of all stages; what a stage did not leave behind is missing from them."""
    junit, probes, rows = (folder / name for name in ("tests.xml", "probes.json", "rows.json"))
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, *TEST_FILES, f"--junitxml={junit}"]
    files = [f"bench/bench_{name}.py" for name in BENCHES]
    budget = 0.9 * seconds * TIMINGS
    benches = [*pytest, *files, "--save", str(rows), "--budget", str(budget)]
    benches += ["--rounds", "1" if dry else "7"]
    figures = ["-m", "bench.gpu_probes", str(probes)]
    stages = {
        "tests": stage("tests", tests, seconds * TESTS, dry),
        "probes": stage("probes", figures, seconds * PROBES, dry),
        "benches": stage("benches", benches, seconds * TIMINGS, dry),
    }
    results: dict[str, Any] = {"stages": stages, "tests": read_tests(junit)}
    for path in (probes, rows):
        if path.exists():
            results |= json.loads(path.read_text(encoding="utf-8"))
    return results


def verdict(results: dict[str, Any]) -> list[str]:
    """What failed, in words; a time above a goal is reported, but no failure."""
    bad = [
        f"stage {name}: {stage['code']}"
        for name, stage in results["stages"].items()
        if stage["code"] != 0
    ]
    bad += [f"test {name}: {reason}" for name, reason in results["tests"]["failed"].items()]
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
