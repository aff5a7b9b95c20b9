# SPDX-License-Identifier: Apache-2.0
"""Installs kdfast from this source tree, for ``python -m bench.gpu``: without network."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.gpu_stages import ROOT

# Of the time of a command, what building may take, and seconds that each try has at least.
SHARE, LEAST = 0.5, 45
# What is tried, in this order: in words, and the variables that say so.
TRIES: dict[str, dict[str, str]] = {
    "with the extension": {},
    "without CUDA C++, which only gathers heads": {"KDFAST_CUDA": "OFF"},
    "without the extension": {"KDFAST_BUILD_EXT": "0"},
}
# Lines of pip's output that show what the compiler said.
SHOWN = 120
PIP = ("-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", ".")


def installed() -> bool:
    """Whether kdfast can be imported with its kernels."""
    try:
        return importlib.util.find_spec("kdfast.kernels") is not None
    except ImportError:  # the package itself says so in a source tree that is not installed
        return False


def build(seconds: float) -> bool:
    """Installs as much as can be built; says what.

    Args:
        seconds: Of the whole command.
    """
    started = time.monotonic()
    for what, variables in TRIES.items():
        print(f"== build {what}: python {' '.join(PIP)}", flush=True)
        left = started + SHARE * seconds - time.monotonic()
        code, text = attempt(environment() | variables, max(LEAST, left))
        if code == 0:
            print(f"built {what} in {time.monotonic() - started:.0f} s", flush=True)
            return True
        print("\n".join([*text.splitlines()[-SHOWN:], f"pip ended with {code}"]), flush=True)
    print("bench.gpu: kdfast could not be installed, see above", file=sys.stderr)
    return False


def attempt(env: dict[str, str], seconds: float) -> tuple[int, str]:
    """Runs pip, and ends it with its compilers after so many seconds; its code and output."""
    pip = subprocess.Popen(
        [sys.executable, *PIP],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text = pip.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(pip.pid, signal.SIGKILL)
        text = pip.communicate()[0]
    return pip.returncode, text


def environment() -> dict[str, str]:
    """The variables of a build: for this GPU alone, by nvcc itself."""
    env = dict(os.environ)
    if torch.cuda.is_available() and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability()
        env.setdefault("KDFAST_CUDA_ARCHS", f"{major}{minor}")
    compiler = cuda_compiler()
    if compiler:
        env.setdefault("CUDACXX", compiler)
    return env


def cuda_compiler() -> str | None:
    """nvcc, or what a script of that name calls: CMake looks for the toolkit beside it."""
    found = shutil.which("nvcc")
    if found is None:
        return None
    with open(found, "rb") as file:
        head = file.read(4096)
    named = re.search(rb"/\S+/nvcc\b", head) if head.startswith(b"#!") else None
    real = Path(os.fsdecode(named[0])) if named else None
    return str(real) if real is not None and real.is_file() else found
