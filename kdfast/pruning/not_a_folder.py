# SPDX-License-Identifier: Apache-2.0
"""What to call instead, where ``load_pretrained`` was not given a folder."""

import difflib
from pathlib import Path

import timm
import torchvision

from kdfast.pruning.folder import CONFIG


def not_a_folder(path: str) -> str:
    """The message of ``load_pretrained`` for a path that is no folder.

    Args:
        path: What was given: a file, the name of a model, or nothing that is known here.
    """
    if Path(path).is_file():
        return f"load_pretrained: {path} is a file, {_of_file(Path(path))}"
    return f"load_pretrained: there is no folder {path}{_of_name(path)}"


def _of_file(path: Path) -> str:
    if (path.parent / CONFIG).is_file():
        return f"give its folder: load_pretrained({str(path.parent)!r})"
    return (
        "not a folder of save_pretrained; weights alone do not say their architecture: "
        f"timm.create_model(NAME, checkpoint_path={str(path)!r}) loads them into a model of timm, "
        f"kdfast.models.load_backbone({str(path)!r}) reads the student of a recovery run"
    )


def _of_name(name: str) -> str:
    kind, _, rest = name.rpartition(":")
    if kind in ("", "timm") and timm.is_model(rest):
        return (
            f"; {rest} is a model of timm, which timm.create_model({rest!r}, pretrained=True) "
            "builds"
        )
    if kind in ("", "torchvision") and rest in torchvision.models.list_models():
        call = f"torchvision.models.get_model({rest!r}, weights='DEFAULT')"
        return f"; {rest} is a model of torchvision, which {call} builds"
    if kind in ("", "hf") and rest.count("/") == 1 and all(rest.split("/")) and rest[0] not in ".~":
        call = f"transformers.AutoModel.from_pretrained({rest!r})"
        return f"; a model of the Hugging Face hub is loaded by {call}"
    if kind in ("", "timm") and "/" not in rest:
        near = difflib.get_close_matches(rest.split(".")[0], timm.list_models(), 3, cutoff=0.8)
        if near:
            return f"; models of timm with a similar name are {', '.join(near)} (timm.create_model)"
    return ""
