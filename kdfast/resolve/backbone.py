# SPDX-License-Identifier: Apache-2.0
"""The EVA-ViT backbone of a file or a folder, as the recovery trainer takes its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdfast.models.checkpoint import load_orion_backbone
from kdfast.models.eva import EVAViT
from kdfast.resolve.models import load_model


def load_eva(path: Path, flag: str, **overrides: Any) -> EVAViT:
    """A backbone with other arguments than those that it was saved with.

    Args:
        path: A file that ``load_orion_backbone`` reads, or a folder of ``kdfast prune``.
        flag: The option that names it, for messages.
        **overrides: Arguments of ``EVAViT`` that change no weight, such as ``drop_path_rate``.

    Raises:
        ValueError: It holds no such backbone.
    """
    if not path.is_dir():
        return load_orion_backbone(path, **overrides)
    saved = load_model(str(path), flag=flag)
    if not isinstance(saved, EVAViT):
        raise ValueError(
            f"{flag}: {path} must be a backbone of ORION, got a {type(saved).__name__}; kdfast "
            "distill and chains train other models"
        )
    model = EVAViT(**{**saved.config, **overrides})
    model.load_state_dict(saved.state_dict())
    return model
