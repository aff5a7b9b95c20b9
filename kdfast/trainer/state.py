# SPDX-License-Identifier: Apache-2.0
"""Random state of a process, and what of a config a resumed run must have in common."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Start all generators of this process that ``rng_state`` holds."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


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


def differences(
    saved: Any, mine: Any, defaults: Mapping[str, Any] | None = None, key: str = ""
) -> list[str]:
    """One line for every value of two trees of plain values that is not the same.

    Args:
        saved: The tree of the beginning.
        mine: That of now.
        defaults: Values of ``mine`` that ``saved`` may lack, because an older version wrote it:
            it had them at their defaults. Dicts as in the trees.
        key: Dotted name of both.
    """
    if not isinstance(saved, dict) or not isinstance(mine, dict):
        return [] if saved == mine else [f"{key} {saved!r}, got {mine!r}"]
    known = defaults if isinstance(defaults, Mapping) else {}
    lines: list[str] = []
    for name in [*saved, *(name for name in mine if name not in saved)]:
        dotted, usual = f"{key}.{name}".strip("."), known.get(name)
        if name in saved or name not in known:
            lines += differences(saved.get(name), mine.get(name), usual, dotted)
        else:
            older = differences(usual, mine[name], None, dotted)
            lines += [f"{line} (an older version, without this key, made it)" for line in older]
    return lines
