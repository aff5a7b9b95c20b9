# SPDX-License-Identifier: Apache-2.0
"""Installs kdfast from this source tree, for ``python -m bench.gpu``: without network."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.gpu_stages import ROOT

# Of the time of a command, what building may take.
SHARE = 0.5
PIP = ("-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", ".")


def installed() -> bool:
    """Whether kdfast can be imported with its kernels."""
    try:
        return importlib.util.find_spec("kdfast.kernels") is not None
    except ImportError:  # the package itself says so in a source tree that is not installed
        return False


def build(seconds: float) -> bool:
    """Installs with the extension, or without it where that fails; says which.

    Args:
        seconds: Of the whole command.
    """
    started = time.monotonic()
    for extension in ("", "0"):
        env = environment() | ({"KDFAST_BUILD_EXT": extension} if extension else {})
        what = "without the extension" if extension else "with the extension"
        print(f"== build {what}: python {' '.join(PIP)}", flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *PIP],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SHARE * seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"bench.gpu: the build took more than {SHARE * seconds:.0f} s", flush=True)
            continue
        if done.returncode == 0:
            print(f"built {what} in {time.monotonic() - started:.0f} s", flush=True)
            return True
        print("\n".join(done.stdout.splitlines()[-40:]), flush=True)
    print("bench.gpu: kdfast could not be installed, see above", file=sys.stderr)
    return False


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
