# SPDX-License-Identifier: Apache-2.0
"""``make test-torch``: what it refuses, what it makes of a test report, and the table of it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

versions = importlib.import_module("bench.versions")
documents = importlib.import_module("bench.documents")

JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="b[1]"/>
<testcase classname="a" name="b[2]"><skipped message="torch 2.10 has no such operator"/></testcase>
<testcase classname="a" name="b[3]"><skipped message="torch 2.10 has no such operator"/></testcase>
<testcase classname="a" name="c"><failure message="wrong"/></testcase>
<testcase classname="a" name="d"><error message="broken"/></testcase>
</testsuite></testsuites>"""


def result(torch: str, passed: int, skipped: dict[str, int], failed: list[str]) -> dict[str, Any]:
    tests = {"passed": passed, "skipped": skipped, "failed": failed, "seconds": 9}
    machine = {"torch": torch, "python": "3.11.7", "commit": "abc", "date": "2000-01-02"}
    packages = {"triton": "3.6.0", "numpy": "2.4.6", "transformers": None}
    return {"machine": machine, "packages": packages, "tests": tests}


def test_outcome_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert versions.outcome(tmp_path / "junit.xml", 61.4) == {
        "passed": 1,
        "skipped": {"torch 2.10 has no such operator": 2},
        "failed": ["a::c", "a::d"],
        "seconds": 61,
    }


def test_table_is_oldest_first_and_says_what_is_lacking() -> None:
    other = {"no CUDA device": 40, "triton 3.6 cannot": 1}
    old = result("2.9.0", 48, {**other, "torch 2.9 has no operator": 2}, ["a::c"])
    old["tests"]["again"] = [{"commit": "def", "tests": ["a::c", "a::d"]}]
    new = result("2.14.1+cu130", 50, {"no CUDA device": 40}, [])
    lines = documents.releases([new, old]).splitlines()
    assert lines[2] == "| 2.9.0 | 3.6.0 | 2.4.6 | none | 3.11.7 | 48 | 43 | 1 | abc | 2000-01-02 |"
    assert lines[3].startswith("| 2.14.1+cu130 | 3.6.0 | 2.4.6 | none | 3.11.7 | 50 | 40 | 0 |")
    assert lines[4:] == [
        "",
        "- triton 3.6 cannot: 1 test",
        "- torch 2.9 has no operator: 2 tests",
        "- torch 2.9.0: 2 of the tests ran again, mended, at commit def",
        "- torch 2.9.0 fails `a::c`",
    ]


def test_unknown_release_names_those_there_are() -> None:
    said = "ERROR: Could not find a version that satisfies the requirement torch==2.99.0 "
    said += "(from versions: 2.10.0, 2.11.0)\nERROR: No matching distribution found"
    found = versions.refusal("2.99.0", said)
    assert "got 2.99.0; there are: 2.10.0, 2.11.0" in found
    assert versions.refusal("2.10.0", "no space left").endswith(
        "cannot be installed:\nno space left"
    )


@pytest.mark.parametrize("version", ["2.10", "newest", "2.11.0+cpu"])
def test_what_is_no_release_is_refused(
    version: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", None)
    with pytest.raises(SystemExit, match="2"):
        versions.main([version])
    assert f"TORCH must be a release such as 2.11.0, got '{version}'" in capsys.readouterr().err


def test_whole_runs_leave_a_result_and_parts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a pytest and a Python that only say what they were given."""
    programs = tmp_path / "build" / "torch-2.9.0" / "venv" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / "build" / "torch-2.9.0" / "source").mkdir()
    facts = {"machine": {"torch": "2.9.0", "commit": "abc"}, "packages": {}}
    report = tmp_path / "build" / "torch-2.9.0" / "junit.xml"
    scripts = {
        "pytest": f"printf '%s ' \"$@\"; echo; echo '{JUNIT}' > {report}; exit 1",
        "python": f"echo '{json.dumps(facts)}'",
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(versions, "installed", lambda version, folder: programs)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "RESULTS", tmp_path)
    assert versions.main(["2.9.0", "tests/test_x.py"]) == 1
    said = capfd.readouterr().out
    assert "not slow" in said and said.endswith(" tests/test_x.py \n")
    assert not (tmp_path / "torch_2.9.0.json").exists()
    assert versions.main(["2.9.0"]) == 1
    written = json.loads((tmp_path / "torch_2.9.0.json").read_text())
    assert written["machine"] == facts["machine"] and written["tests"]["passed"] == 1
    # Of the two that failed one passes now.
    mended = """<testsuites><testcase classname="a" name="c"/>
<testcase classname="a" name="d"><error message="broken"/></testcase></testsuites>"""
    script = f"#!/bin/sh\nprintf '%s ' \"$@\"; echo '{mended}' > {report}; exit 1\n"
    (programs / "pytest").write_text(script)
    assert versions.main(["2.9.0", "--failed"]) == 1
    assert "a.py::c a.py::d" in capfd.readouterr().out
    again = json.loads((tmp_path / "torch_2.9.0.json").read_text())["tests"]
    assert (again["passed"], again["failed"]) == (2, ["a::d"])
    assert again["again"] == [{"commit": "abc", "tests": ["a::c", "a::d"]}]


@pytest.mark.parametrize("stored", [None, []])
def test_nothing_to_run_again(
    stored: list[str] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions, "RESULTS", tmp_path)
    if stored is not None:
        (tmp_path / "torch_2.9.0.json").write_text(json.dumps(result("2.9.0", 1, {}, stored)))
    with pytest.raises(SystemExit, match="2"):
        versions.main(["2.9.0", "--failed"])
    said = capsys.readouterr().err
    assert ("needs" if stored is None else "nothing failed in") in said


def test_runs_without_packages() -> None:
    """The Python that makes the venv has nothing installed."""
    command = [sys.executable, "-S", "-m", "bench.versions", "--help"]
    done = subprocess.run(command, cwd=versions.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "TORCH=2.11.0" in done.stdout, done.stderr
