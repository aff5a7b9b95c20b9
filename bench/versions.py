# SPDX-License-Identifier: Apache-2.0
"""``make test-torch TORCH=2.11.0``: the tests under another torch, with the triton that it pins.

The last commit is cloned into build/torch-2.11.0/source and installed, its extension built, into a
venv beside that, so neither the checkout nor the build for another torch is touched. The result
is bench/results/torch_2.11.0.json, of which `python -m bench.documents` makes the table of
docs/use/compatibility.md. After a mend ARGS=--failed runs those again that failed in that file, and
notes the commit that they ran at. More arguments go to pytest; no result is written then. pip takes
its settings as always, such as PIP_INDEX_URL for wheels without CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TOOLS = ("setuptools>=64", "wheel", "pybind11", "cmake", "ninja")
EXTRAS = "train,test,bench,hf,export,examples"
FACTS = """
import importlib.metadata as metadata, json
from kdfast.machine.facts import machine_facts
names = ("torchvision", "triton", "numpy", "timm", "transformers")
found = {d.name: d.version for d in metadata.distributions() if d.name in names}
print(json.dumps({"machine": machine_facts(), "packages": {n: found.get(n) for n in names}}))
"""


def installed(version: str, folder: Path) -> Path:
    """The programs of a venv in ``folder`` with that torch and what is committed.

    Raises:
        SystemExit: There is no such torch for this Python, or something cannot be installed.
    """
    source, programs = folder / "source", folder / "venv" / "bin"
    if not (programs / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    # torchvision says which torch it fits; what torch needs, triton among it, comes with it.
    wanted = (f"torch=={version}", "torchvision")
    done = subprocess.run([*pip, *TOOLS, *wanted], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(refusal(version, done.stderr))
    if not source.exists():
        subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, source], check=True)
    git = ["git", "-C", source]
    subprocess.run([*git, "fetch", "--quiet", ROOT, "HEAD"], check=True)
    subprocess.run([*git, "reset", "--quiet", "--hard", "FETCH_HEAD"], check=True)
    # Without a device nothing runs the CUDA kernels, which take minutes to compile.
    settings = {"KDFAST_CUDA": "OFF", **os.environ}
    mine = [*pip, "--no-build-isolation", "-e", f"{source}[{EXTRAS}]", wanted[0]]
    if subprocess.run(mine, env=settings, check=False).returncode:
        sys.exit(f"test-torch: kdfast cannot be installed with torch {version}; pip says why above")
    return programs


def refusal(version: str, said: str) -> str:
    """What to say of a torch that cannot be installed: which releases there are, or pip's words."""
    listed = re.search(r"torch==\S+ \(from versions: ([^)]*)\)", said)
    if listed is None:
        return f"test-torch: torch {version} cannot be installed:\n{said}"
    python = ".".join(map(str, sys.version_info[:2]))
    return (
        f"test-torch: TORCH must be a release that pip finds for Python {python} here, "
        f"got {version}; there are: {listed[1]}"
    )


def outcome(report: Path, seconds: float) -> dict[str, Any]:
    """What a JUnit file says: how many passed, how many were skipped why, which failed."""
    skipped: Counter[str] = Counter()
    passed, failed = 0, []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        parts = {part.tag: part for part in case}
        if "failure" in parts or "error" in parts:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in parts:
            skipped[parts["skipped"].get("message", "")] += 1
        else:
            passed += 1
    reasons = dict(sorted(skipped.items()))
    return {"passed": passed, "skipped": reasons, "failed": failed, "seconds": round(seconds)}


def main(argv: Sequence[str]) -> int:
    """Installs, tests, and writes the result of a whole run."""
    parser = argparse.ArgumentParser(prog="make test-torch", description=__doc__)
    parser.add_argument("torch", help="a release, such as 2.11.0")
    parser.add_argument(
        "--failed", action="store_true", help="only the tests that failed in the stored result"
    )
    options, more = parser.parse_known_args(argv)
    version: str = options.torch
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        parser.error(f"TORCH must be a release such as 2.11.0, got {version!r}")
    path, before = RESULTS / f"torch_{version}.json", None
    if options.failed:
        if more or not path.is_file():
            parser.error(f"--failed takes no more arguments and needs {path}, of a whole run")
        before = json.loads(path.read_text(encoding="utf-8"))
        if not before["tests"]["failed"]:
            parser.error(f"nothing failed in {path}")
    folder = ROOT / "build" / f"torch-{version}"
    programs = installed(version, folder)
    source, report = folder / "source", folder / "junit.xml"
    report.unlink(missing_ok=True)
    settings = {"KDFAST_SHARED": str(ROOT.parent / "shared"), **os.environ}
    command = [programs / "pytest", "-n", "2", "-m", "not slow", f"--junitxml={report}"]
    again = [] if before is None else [node(name) for name in before["tests"]["failed"]]
    begun, tests = time.monotonic(), again or more or ["tests"]
    done = subprocess.run([*command, *tests], cwd=source, env=settings, check=False)
    if more or not report.exists():
        return done.returncode
    asked = [programs / "python", "-c", FACTS]
    facts = json.loads(subprocess.run(asked, cwd=source, stdout=-1, check=True).stdout)
    found = outcome(report, time.monotonic() - begun)
    whole = {**facts, "tests": found}
    result = whole if before is None else mended(before, found, facts["machine"]["commit"])
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: written; `python -m bench.documents` puts it into the table")
    return done.returncode


def node(name: str) -> str:
    """What pytest calls a test that a JUnit file names ``tests.test_x::test_y``."""
    place, _, test = name.partition("::")
    return f"{place.replace('.', '/')}.py::{test}"


def mended(before: dict[str, Any], found: dict[str, Any], commit: str) -> dict[str, Any]:
    """A result with the outcome of those tests that failed in it and ran again."""
    tests, skipped = before["tests"], Counter(before["tests"]["skipped"])
    skipped.update(found["skipped"])
    now = {
        "passed": tests["passed"] + found["passed"],
        "skipped": dict(sorted(skipped.items())),
        "failed": found["failed"],
        "again": [*tests.get("again", []), {"commit": commit, "tests": tests["failed"]}],
    }
    return before | {"tests": tests | now}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
