# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a stage, out-of-memory errors, and letting go of memory between stages."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import torch

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if _CLEAR.exists():
        # 5 resets the high-water mark of the resident memory (man 5 proc).
        _CLEAR.write_text("5")


def peak_mib(device: torch.device) -> dict[str, float]:
    """Peaks since ``reset_peak``, in MiB.

    Returns:
        ``gpu``: allocated on the GPU; ``gpu_reserved``: taken from the GPU by torch; both 0
        without one. ``host``: resident memory of the process; where the system keeps no
        high-water mark, the resident memory now.
    """
    gpu = reserved = 0.0
    if device.type == "cuda":
        gpu = torch.cuda.max_memory_allocated(device) / MIB
        reserved = torch.cuda.max_memory_reserved(device) / MIB
    return {"gpu": gpu, "gpu_reserved": reserved, "host": _resident_peak()}


def _resident_peak() -> float:
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return float(psutil.Process().memory_info().rss) / MIB


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "can't allocate memory" in text
    )


def release(device: torch.device) -> None:
    """Collect cycles and give cached GPU memory back; the caller has dropped its references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
