# SPDX-License-Identifier: Apache-2.0
"""What a run left in its folder, in a form that two runs can be compared by."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from kdfast.trainer.commits import MANIFEST, check_file, load_checkpoint, read_manifest

# Times, memory and the like differ between any two runs; so do checksums of safetensors, which
# writes its metadata in any order, and which are compared with the files instead.
MEASURED = {
    *(
        "seconds",
        "elapsed",
        "epoch_time_sec",
        "images_per_s",
        "time",
        "data_time",
        "ms",
        "latency_ms",
        "date",
        *("machine", "sha256"),
    ),
    *("memory_mib", "peak_mib", "gpu_memory_mb", "gpu_reserved_mb", "host_memory_mb"),
}
# Text for people, drawings, and files named after the clock.
UNCOMPARED = {".log", ".txt", ".png", ".html", ".md"}


def state_of(folder: Path) -> dict[str, Any]:
    """Names and content of all files of a folder, without what was measured.

    Raises:
        ValueError: A file is not what its manifest says.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found: dict[str, Any] = {}
    for path in files:
        name = str(path.relative_to(folder))
        if "tensorboard" not in path.parts:
            found[name] = _content(path, str(folder))
    return found


def _content(path: Path, folder: str) -> Any:
    if path.name == MANIFEST:
        entries = read_manifest(path)
        for name in entries:
            if name.endswith(".pt"):
                check_file(path.with_name(name))
        return {name: entry.step for name, entry in entries.items()}
    if path.suffix == ".pt":
        return _plain(load_checkpoint(path), folder)
    if path.suffix == ".json":
        if path.name.startswith("teacher-"):
            for name in read_manifest(path):
                check_file(path.with_name(name), path)
        return _plain(json.loads(path.read_text(encoding="utf-8")), folder)
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return _plain(list(csv.DictReader(file)), folder)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as tensors:
            held = {name: tensors.get_tensor(name) for name in tensors.keys()}
            return _plain({**held, "metadata": tensors.metadata()}, folder)
    if path.suffix in UNCOMPARED:
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _plain(x, folder) for key, x in value.items() if key not in MEASURED}
    if isinstance(value, (list, tuple)):
        return [_plain(x, folder) for x in value]
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(np.ascontiguousarray(flat.numpy()).data).hexdigest()
    return value.replace(folder, ".") if isinstance(value, str) else value


def difference(wanted: dict[str, Any], got: dict[str, Any]) -> str:
    """The first difference in words; empty if there is none."""
    if wanted.keys() != got.keys():
        missing, more = wanted.keys() - got.keys(), got.keys() - wanted.keys()
        return f"missing {sorted(missing)}, left over {sorted(more)}"
    for name, value in wanted.items():
        if value != got[name]:
            return f"{name}: {_first(value, got[name])}"
    return ""


def _first(wanted: Any, got: Any, at: str = "") -> str:
    if isinstance(wanted, dict) and isinstance(got, dict):
        for key in {**wanted, **got}:
            if wanted.get(key) != got.get(key):
                return _first(wanted.get(key), got.get(key), f"{at}.{key}")
    if isinstance(wanted, list) and isinstance(got, list) and len(wanted) == len(got):
        for number, (a, b) in enumerate(zip(wanted, got, strict=True)):
            if a != b:
                return _first(a, b, f"{at}[{number}]")
    return f"{at} must be {wanted!r}, got {got!r}"[:300]
