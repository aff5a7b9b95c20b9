# SPDX-License-Identifier: Apache-2.0
"""What `python -m bench.gpu` does before anything else: builds kdfast where it is not installed."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def build() -> Any:
    return importlib.import_module("bench.gpu_build")


def test_nothing_of_kdfast_is_needed_for_it() -> None:
    code = "import sys; sys.modules['kdfast'] = None; import bench.gpu; print('here')"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "here\n", done.stderr


def test_it_is_installed(build: Any) -> None:
    assert build.installed()


def test_nvcc_is_found_behind_a_script(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, real = tmp_path / "bin" / "nvcc", tmp_path / "cuda" / "bin" / "nvcc"
    for file in (script, real):
        file.parent.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(script.parent))
    assert build.cuda_compiler() is None
    script.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    script.chmod(0o755)
    assert build.cuda_compiler() == str(script)  # it names what is not there
    real.write_bytes(b"\x7fELF")
    assert build.cuda_compiler() == str(real)
    script.write_bytes(b"\x7fELF")
    assert build.cuda_compiler() == str(script)


def test_a_failed_build_is_tried_without_the_extension(
    build: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what pip says is shown."""
    fail = "import os, sys; print('what pip says'); "
    fail += "sys.exit(os.environ.get('KDFAST_BUILD_EXT') != '0')"
    monkeypatch.delenv("KDFAST_BUILD_EXT", raising=False)
    monkeypatch.setattr(build, "PIP", ("-c", fail))
    assert build.build(60)
    out = capsys.readouterr().out
    assert "what pip says" in out and "built without the extension in " in out
    monkeypatch.setattr(build, "PIP", ("-c", "import sys; sys.exit(1)"))
    assert not build.build(60)
    assert "could not be installed" in capsys.readouterr().err


def test_a_build_that_takes_too_long_is_stopped_with_its_compilers(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "still there"
    compiler = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    pip = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {compiler!r}])"
    monkeypatch.setattr(build, "PIP", ("-c", pip))
    started = time.monotonic()
    assert build.attempt(dict(os.environ), 1.0)[0] == -signal.SIGKILL
    assert time.monotonic() - started < 2.5
    time.sleep(3.5)
    assert not mark.exists()
