# SPDX-License-Identifier: Apache-2.0
"""The kind of data that a folder or file holds, by the names in it; no file is opened."""

from __future__ import annotations

import re
from pathlib import Path

_CIFAR = re.compile(r"cifar-(10|100)-(python|binary|batches)")
_MEDMNIST = re.compile(r"([a-z]+mnist)(_\d+)?\.npz")


def chain_kind(text: str) -> str | None:
    """Kind of labelled data, for chains; None where there is nothing."""
    path = Path(text).expanduser()
    if not path.exists():
        return None
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
    path = Path(text).expanduser()
    if not path.is_dir():
        return None
    if (path / "kdfast_infos_train").is_dir():
        return "frames"
    return "bench2drive" if (path / "v1").is_dir() else "images"
