# SPDX-License-Identifier: Apache-2.0
"""The model inside a chain's checkpoint."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from kdfast.machine.files import load_torch
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
        ValueError: It is one, but damaged.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        state = load_torch(path, mmap=True)
        link, data = state["meta"]["link"], state["meta"]["data"]
    except (KeyError, TypeError, ValueError):
        return None
    check_file(Path(path))
    model = timm.create_model(link["model"], num_classes=len(data["classes"]), **link["args"])
    model.load_state_dict(weights_of(state))
    return model
