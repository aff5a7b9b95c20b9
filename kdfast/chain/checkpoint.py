# SPDX-License-Identifier: Apache-2.0
"""The model inside a chain's checkpoint."""

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
from kdfast.trainer.commits import check_file


def weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The timm model's weights in a checkpoint: the averaged ones where there are such."""
    module, prefix = state["module"], "student.net."
    if state.get("ema") is not None:
        module, prefix = state["ema"], "net."
    return {k[len(prefix) :]: v for k, v in module.items() if k.startswith(prefix)}


def model_of(path: str | Path) -> nn.Module | None:
    """The timm model of a checkpoint file, or None if the file is no chain's checkpoint.

    Raises:
        ValueError: The file is damaged, or describes no model that its weights fit.
    """
    if not is_archive(path):
        return None
    try:
        state = load_torch(path, mmap=True)
        link, data = state["meta"]["link"], state["meta"]["data"]
    except (NeedsCode, KeyError, TypeError, IndexError):
        return None
    check_file(Path(path))
    try:
        name, arguments, weights = link["model"], link["args"], weights_of(state)
        size = Size(Path(path), Path(path).stat().st_size, len(weights))
        check_timm(name, arguments)
        check_counts(dict(arguments), size)
        with bounded(size), torch.device("meta"):
            plan = timm.create_model(name, num_classes=len(data["classes"]), **arguments)
        plan.load_state_dict(weights, assign=True)
        if problems := weight_problems(weights, plan.state_dict()):
            raise ValueError("; ".join(problems))
        model: nn.Module = timm.create_model(name, num_classes=len(data["classes"]), **arguments)
        model.load_state_dict(weights)
    except Exception as error:  # constructors stumble over whatever a file says
        raise ValueError(f"{path} must hold a whole link of a chain: {error}") from error
    return model
