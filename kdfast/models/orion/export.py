# SPDX-License-Identifier: Apache-2.0
"""The way back into ORION's code: weights under its names, and a backbone that it can build."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdfast.machine.files import load_torch, replacing
from kdfast.models.eva import EVAViT
from kdfast.models.orion import adapter
from kdfast.models.orion_keys import orion_tables

PREFIX = "img_backbone."
ADAPTER = "kdfast_orion.py"


def export_orion(
    student: EVAViT, path: str | Path, base: str | Path | None = None
) -> tuple[Path, Path]:
    """Write a pruned backbone as ORION reads one, and the file that builds it there.

    Args:
        student: Full or pruned backbone.
        path: ``.pth`` file to write: ``state_dict`` with keys ``img_backbone.*`` and ``meta`` with
            the architecture.
        base: ORION's own checkpoint; everything but its backbone is taken along, so that the file
            is a whole model. None: the backbone alone.

    Returns:
        The checkpoint, and `kdfast_orion.py` beside it: PyTorch alone, without kdfast and
        flash-attention; its first lines say where it goes.

    Raises:
        TypeError: ``student`` is no EVAViT.
        ValueError: ``base`` is damaged or holds no ``state_dict``.
    """
    if not isinstance(student, EVAViT):
        raise TypeError(f"export_orion: student must be an EVAViT, got {type(student).__name__}")
    target = Path(path).expanduser()
    own = dict(student.state_dict()) | orion_tables(student.config)
    state = {} if base is None else _rest(Path(base).expanduser())
    state |= {PREFIX + name: x.detach().cpu().contiguous().clone() for name, x in own.items()}
    config = dict(student.config) | {"heads": student.heads, "mlp_hidden": student.mlp_hidden}
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        torch.save({"meta": {"kdfast": json.dumps(config)}, "state_dict": state}, partial)
    beside = target.with_name(ADAPTER)
    with replacing(beside) as partial:
        shutil.copyfile(Path(adapter.__file__), partial)
    return target, beside


def _rest(path: Path) -> dict[str, Any]:
    """Tensors of a checkpoint of ORION without its backbone."""
    held = load_torch(path, mmap=True)
    state = held.get("state_dict", held) if isinstance(held, Mapping) else None
    if not isinstance(state, Mapping) or not any(key.startswith(PREFIX) for key in state):
        raise ValueError(
            f"export_orion: base must be a checkpoint of ORION with {PREFIX}*, got {path} without"
        )
    return {key: value for key, value in state.items() if not key.startswith(PREFIX)}
