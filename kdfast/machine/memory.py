# SPDX-License-Identifier: Apache-2.0
"""Memory that a call or a process takes, out-of-memory errors, and letting go of memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

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
    return {"gpu": gpu, "gpu_reserved": reserved, "host": resident_bytes()[1] / MIB}


def resident_bytes() -> tuple[int, int]:
    """Resident memory of the process now, and its peak since ``reset_peak``.

    Where the system keeps no high-water mark, both are the memory now.
    """
    import psutil  # bench.gpu measures GPUs where it is not installed

    now = int(psutil.Process().memory_info().rss)
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return now, max(now, int(line.split()[1]) * 1024)
    return now, now


def free_bytes(device: torch.device) -> int:
    """Memory that is free now, on the GPU or on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


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


def memory_mib(device: torch.device) -> float:
    """Peak of allocated GPU memory, or the process's resident memory now, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resident_bytes()[0] / MIB


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes that autograd keeps for backward during ``call``, each storage counted once."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(seen.values())


def peak_bytes(call: Callable[[], object], device: torch.device | None = None) -> int:
    """Highest extra memory that tensors held at one time during ``call``, in bytes.

    On CUDA the allocator's own counter; on the CPU the allocation events of torch's profiler, so
    scratch that a kernel takes outside torch's allocator is not counted.

    Args:
        call: What is measured.
        device: Whose memory; None: the GPU's where there is one.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler's library would write its own log to the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def memory_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """``peak_bytes`` and ``saved_bytes`` of one and the same call."""
    saved: list[int] = []
    return peak_bytes(lambda: saved.append(saved_bytes(call))), saved[0]
