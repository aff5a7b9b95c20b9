# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files that are always whole, the random state in them, and what a resume compares."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.machine.files import load_torch, replacing

LAST, PREVIOUS = "last.pt", "previous.pt"
FORMAT = 1


def rng_state() -> dict[str, Any]:
    """State of this process's generators (torch, CUDA, numpy, python) as tensors and lists."""
    name, words, position, has_gauss, gauss = np.random.get_state()
    version, internal, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        # A run on the CPU must not make a context on the GPU.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "numpy": [name, [int(word) for word in words], position, has_gauss, gauss],
        "python": [version, list(internal), python_gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back into a state of ``rng_state``."""
    torch.set_rng_state(state["torch"].cpu())
    for cuda in state["cuda"]:
        torch.cuda.set_rng_state(cuda.cpu())
    name, words, *rest = state["numpy"]
    np.random.set_state((name, np.array(words, np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write ``last.pt``; the one before stays as ``previous.pt``.

    The file is written aside, flushed to the disk and renamed, so a process that dies at any
    moment leaves at least one whole checkpoint.

    Args:
        folder: Exists already.
        state: Tensors, plain containers and scalars.
    """
    last = folder / LAST
    with replacing(last) as partial:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if last.exists():
            os.replace(last, folder / PREVIOUS)
    _sync_folder(folder)
    return last


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder, or None."""
    return next((folder / n for n in (LAST, PREVIOUS) if (folder / n).is_file()), None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; no code from the file is run.

    Raises:
        ValueError: The file is broken, or of another format.
    """
    try:
        state: dict[str, Any] = load_torch(path)
    except ValueError as error:
        older = path.with_name(PREVIOUS)
        hint = f"; without it {older} is taken" if path.name == LAST and older.is_file() else ""
        raise ValueError(f"checkpoint: {error}{hint}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"checkpoint: {path} must have format {FORMAT}, got {found!r}")
    return state


def identity(tree: dict[str, Any], free: Iterable[str]) -> dict[str, Any]:
    """The part of a config that a resumed run must have in common with its beginning.

    Args:
        tree: The config as dicts, lists and scalars.
        free: Dotted names of the values that may change: they move files, or stop the run
            elsewhere, but what is computed stays the same.
    """
    kept = copy.deepcopy(tree)
    for name in free:
        *sections, leaf = name.split(".")
        part = kept
        for section in sections:
            part = part[section]
        del part[leaf]
    return kept


def differences(saved: Any, mine: Any, key: str = "") -> list[str]:
    """One line for every value of two trees of plain values that is not the same."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        names = [*saved, *(name for name in mine if name not in saved)]
        return [
            line
            for name in names
            for line in differences(saved.get(name), mine.get(name), f"{key}.{name}".strip("."))
        ]
    return [] if saved == mine else [f"{key} {saved!r}, got {mine!r}"]


def _sync_folder(folder: Path) -> None:
    # Without this a power loss could undo the renames; not every system can open a folder.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
