# SPDX-License-Identifier: Apache-2.0
"""The model inside the checkpoint of a chain's link."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from kdfast.machine.archive import is_archive
from kdfast.machine.bounded import Size, bounded, check_counts
from kdfast.machine.files import NeedsCode, load_torch
from kdfast.machine.weights import weight_problems
from kdfast.models.timm_args import check_timm
from kdfast.pruning.architecture import build, set_tables
from kdfast.trainer.commits import check_file


def is_link(content: Any) -> bool:
    """Whether a checkpoint is one of a chain's link."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return isinstance(meta, Mapping) and {"link", "data"} <= set(meta) and "module" in content


def weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's weights in a checkpoint: the averaged ones where there are such."""
    module, prefix = state["module"], "student.net."
    if state.get("ema") is not None:
        module, prefix = state["ema"], "net."
    return {k[len(prefix) :]: v for k, v in module.items() if k.startswith(prefix)}


def model_of(path: str | Path) -> nn.Module | None:
    """The model of a checkpoint file, or None if the file is no chain's checkpoint.

    Raises:
        ValueError: The file is damaged, or describes no model that its weights fit.
    """
    if not is_archive(path):
        return None
    try:
        state = load_torch(path, mmap=True)
    except NeedsCode:
        return None
    if not is_link(state):
        return None
    check_file(Path(path))
    try:
        return _built(Path(path), state)
    except Exception as error:  # constructors stumble over whatever a file says
        raise ValueError(f"{path} must hold a whole link of a chain: {error}") from error


def _built(path: Path, state: Mapping[str, Any]) -> nn.Module:
    link, weights = state["meta"]["link"], weights_of(state)
    size = Size(path, path.stat().st_size, len(weights))
    description = link.get("config")
    classes = len(state["meta"]["data"]["classes"])
    if description is None:
        check_timm(link["model"], link["args"])
    check_counts(dict(description or link["args"]), size)

    def made() -> nn.Module:
        if description is not None:
            return build(description)
        model: nn.Module = timm.create_model(link["model"], num_classes=classes, **link["args"])
        return model

    with bounded(size), torch.device("meta"):
        plan = made()
    plan.load_state_dict(weights, assign=True)
    if problems := weight_problems(weights, plan.state_dict()):
        raise ValueError("; ".join(problems))
    model = made()
    model.load_state_dict(weights)
    if description is not None:
        set_tables(model, description.get("kdfast", {}).get("tables", {}))
    return model
