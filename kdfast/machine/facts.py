# SPDX-License-Identifier: Apache-2.0
"""Facts that are kept beside a measurement: the machine, the versions and the commit."""

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from kdfast._version import __version__
from kdfast.ops._library import EXTENSION
from kdfast.ops._processor import processor


def machine_facts() -> dict[str, Any]:
    """CPU or GPU name, microarchitecture, ISA, threads, versions, the commit that runs."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "family": processor().name,
        "gpu": gpu,
        "isa": EXTENSION.cpu_isa() if EXTENSION else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kdfast": __version__,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*args: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git, as on machines that get a copy of the tree
        return None
    return done.stdout.strip() if done.returncode == 0 else None
