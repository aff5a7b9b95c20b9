# SPDX-License-Identifier: Apache-2.0
"""Embedded defaults: the config that stands in for one whose checkpoint and data are absent.

It needs no file, so that every command runs on a fresh clone; its ``note`` says what happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.configs.chain import ChainConfig
from kdfast.configs.recovery import Config

# Name of a config that needs files, and of the one that stands in for it.
STAND_INS = {
    "orion50": "orion50_scenes",
    "vit_chain": "vit_chain_digits",
    "cnn_chain": "cnn_chain_digits",
}


def stand_in(default: Config | ChainConfig, user: Mapping[str, Any]) -> tuple[str, str]:
    """The name of the config to start from, and the note about it.

    Args:
        default: The config as its function returns it.
        user: What the user sets, by dotted key.

    Returns:
        The name of the stand-in and why it is used; or the name of ``default`` and no note.
    """
    if default.name not in STAND_INS:
        return default.name, ""
    if isinstance(default, ChainConfig):
        return _for_chain(default, user)
    return _for_recovery(default, user)


def _for_recovery(default: Config, user: Mapping[str, Any]) -> tuple[str, str]:
    """Used only where the user named neither the checkpoint nor the data and both are absent.

    With one of them there, the user is told what the other one is.
    """
    checkpoint, root = str(default.teacher.checkpoint), str(default.data.root)
    if "teacher.checkpoint" in user:
        return default.name, ""
    rendered = user.get("data.kind") == "scenes"
    if not rendered and ("data.kind" in user or "data.root" in user):
        return default.name, ""
    has_checkpoint, has_data = Path(checkpoint).is_file(), Path(root).is_dir()
    if has_checkpoint == has_data and not has_data or (rendered and not has_checkpoint):
        absent = checkpoint if rendered and has_data else f"{checkpoint} and {root}"
        name = STAND_INS[default.name]
        note = f"EMBEDDED DEFAULT: no {absent}, so this is {name}: rendered scenes"
        return name, f"{note} and a small EVA-ViT teacher trained here"
    return default.name, ""


def _for_chain(default: ChainConfig, user: Mapping[str, Any]) -> tuple[str, str]:
    """Used only where the user named no data and those of ``default`` are absent."""
    root = str(default.data.root)
    digits = user.get("data.kind") == "digits"
    if not digits and ("data.kind" in user or "data.root" in user or Path(root).exists()):
        return default.name, ""
    why = "data.kind is digits" if digits else f"no {root}"
    name = STAND_INS[default.name]
    note = f"EMBEDDED DEFAULT: {why}, so this is {name}: scikit-learn's digits"
    return name, f"{note} and small models trained here"
