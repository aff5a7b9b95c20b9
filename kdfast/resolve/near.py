# SPDX-License-Identifier: Apache-2.0
"""What a name that stands for no model may have meant."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import timm
import torchvision

TORCHVISION, HUGGING_FACE = "torchvision:", "hf:"
# Endings of files of weights.
SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".tar")
SHOWN = 3


def torchvision_names() -> list[str]:
    """Names of torchvision's classification models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a file or a folder."""
    return os.sep in name or name.lower().endswith(SUFFIXES)


def did_you_mean(name: str) -> str:
    """The end of a message that says what else there is; empty where nothing is similar."""
    found = _files(Path(name)) if looks_like_path(name) else []
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not found:
        found = [HUGGING_FACE + name]  # owner/model, as the hub of Hugging Face writes it
    for start in ("hf-hub:", "hf_hub:"):
        if name.startswith(start):
            found = [HUGGING_FACE + name.removeprefix(start)]
    found = found or _names(name)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _names(name: str) -> list[str]:
    """Similar names of timm, torchvision and of files here."""
    short = name.removeprefix(TORCHVISION).split(".")[0]
    if short in torchvision_names():
        return [TORCHVISION + short]
    if name.startswith(TORCHVISION):
        near = difflib.get_close_matches(short, torchvision_names(), SHOWN)
        return [TORCHVISION + found for found in near]
    return difflib.get_close_matches(short, timm.list_models(), SHOWN) or _files(Path(name))


def _files(path: Path) -> list[str]:
    """Files of weights and folders of models beside a path, the most similar ones first."""
    parent = path.parent
    if not parent.is_dir():
        return []
    here = {
        entry.name: entry.stem
        for entry in sorted(parent.iterdir())
        if entry.suffix.lower() in SUFFIXES or (entry / "config.json").is_file()
    }
    close = difflib.get_close_matches(path.stem, here.values(), SHOWN)
    return [str(parent / name) for name, stem in here.items() if stem in close][:SHOWN]
