# SPDX-License-Identifier: Apache-2.0
"""The config that a command starts from where the files decide: its ``note`` says what happened.

An embedded default stands in for a config whose checkpoint and data are absent. It needs no file,
so that every command runs on a fresh clone. ``orion50`` learns from labels where there are any.
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
    root = str(user.get("data.root", root))
    if "data.kind" not in user and _has_infos(Path(root).expanduser()):
        note = f"{root} has infos: the loss of ORION's heads is a part of the objective"
        return "orion50_frames", f"{note} (data.kind=bench2drive leaves it out)"
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


def _has_infos(root: Path) -> bool:
    """Whether `kdfast.data infos` has prepared a folder."""
    names = ("kdfast_infos_train", "kdfast_infos_val", "kdfast_maps")
    return all((root / name).is_dir() for name in names)


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
