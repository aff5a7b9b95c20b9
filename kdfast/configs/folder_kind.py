# SPDX-License-Identifier: Apache-2.0
"""The kind of data that a folder, file, pattern or URL holds, by the names in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

# What the Hugging Face library leaves in a folder that it saves to.
_SAVED = ("dataset_dict.json", "state.json")
_CIFAR = re.compile(r"cifar-(10|100)-(python|binary|batches)")
_MEDMNIST = re.compile(r"([a-z]+mnist)(_\d+)?\.npz")


def is_elsewhere(text: str) -> bool:
    """Whether a place is a pattern or a URL, which is not looked at here."""
    return "://" in text or any(mark in text for mark in "*?{")


def chain_kind(text: str) -> str | None:
    """Kind of labelled data, for chains; None where there is nothing."""
    if is_elsewhere(text):
        return _elsewhere(text)
    path = Path(text).expanduser()
    if not path.exists():
        return None
    if _is_saved(path):
        return "huggingface"
    names = [path.name, *(sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [])]
    for name in names:
        if found := _CIFAR.match(name):
            return f"cifar{found[1]}"
        if found := _MEDMNIST.fullmatch(name):
            return found[1]
    if path.suffix == ".parquet" or any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
        return "parquet"
    return "webdataset" if any(path.glob("*.tar")) else "imagefolder"


def view_kind(text: str) -> str | None:
    """Kind of views, for pruning runs; None where there is nothing."""
    if is_elsewhere(text):
        return _elsewhere(text)
    path = Path(text).expanduser()
    if not path.is_dir():
        return "huggingface" if path.suffix == ".parquet" else None
    if (path / "kdfast_infos_train").is_dir():
        return "frames"
    if (path / "v1").is_dir():
        return "bench2drive"
    if any(path.glob("*.tar")):
        return "bench2drive" if _packed(path) == "bench2drive" else "webdataset"
    parquet = any(path.glob("*.parquet")) or any(path.glob("*/*.parquet"))
    return "huggingface" if parquet or _is_saved(path) else "images"


def _elsewhere(text: str) -> str:
    return "huggingface" if text.endswith(".parquet") else "webdataset"


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED)


def _packed(path: Path) -> str | None:
    """What ``kdfast data shard`` packed; None for shards of others."""
    try:
        return str(json.loads((path / "kdfast_shards.json").read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, LookupError, TypeError):  # its reader says what is wrong with it
        return None
