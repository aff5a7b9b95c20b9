# SPDX-License-Identifier: Apache-2.0
"""The model that ``--model`` and ``--checkpoint`` of a command line stand for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import Tensor, nn

from kdfast.chain.checkpoint import model_of
from kdfast.machine.files import load_torch
from kdfast.machine.weights import weight_problems
from kdfast.models.checkpoint import load_orion_backbone
from kdfast.pruning.folder import read_safetensors
from kdfast.pruning.hf_folder import load_headless
from kdfast.pruning.saving import load_pretrained
from kdfast.sources.error import SourceError

TORCHVISION, HUGGING_FACE = "torchvision:", "hf:"
MODEL_HELP = "timm name, torchvision:NAME, hf:FOLDER or a saved model's folder"
# Entries under which training scripts put the weights, the outermost first, averaged ones before.
WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model", "student", "module")
# What wrappers of a model put before its names.
WRAPPERS = ("module.", "_orig_mod.")


def load_model(
    name: str | None, checkpoint: str | None = None, *, pretrained: bool = False
) -> nn.Module:
    """The model of a name, of a checkpoint, or of a name with the weights of a checkpoint.

    Args:
        name: Value of ``--model``: a timm name, ``torchvision:NAME``, ``hf:FOLDER``, or a folder
            that ``load_pretrained`` reads, such as ``--out`` of ``kdfast.prune``. None: the
            checkpoint says it, see ``load_saved``.
        checkpoint: Value of ``--checkpoint``: a file with the weights of ``name``.
        pretrained: Download the weights of a name of timm or torchvision.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        SourceError: There is no such model or file, or they do not fit each other.
    """
    if name is None:
        if checkpoint is None:
            raise SourceError("give --model, --checkpoint or both")
        return load_saved(checkpoint)
    if checkpoint is None:
        return _named(name, pretrained, None).eval()
    if not Path(checkpoint).is_file():
        raise SourceError(f"--checkpoint: there is no file {checkpoint}")
    state = read_state(checkpoint)
    model = _named(name, pretrained, _classes(state))
    try:
        if problems := weight_problems(state, model.state_dict()):
            raise ValueError("; ".join(problems))
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise SourceError(f"--checkpoint: {checkpoint} must fit {name}: {error}") from error
    return model.eval()


def load_saved(path: str | Path, flag: str = "--checkpoint") -> nn.Module:
    """The model that a file or a folder holds with its architecture.

    Args:
        path: A folder that ``load_pretrained`` reads, or a file: of ``save_backbone``, an ORION
            checkpoint, or a checkpoint of a chain's link.
        flag: The option that names it, for messages.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        SourceError: There is no such file or folder, or it holds something else.
    """
    if Path(path).is_dir():
        return _of_folder(str(path), flag)
    if not Path(path).is_file():
        raise SourceError(f"{flag}: there is no file {path}")
    try:
        if (link := model_of(path)) is not None:
            return link.eval()
        return load_orion_backbone(path, with_cp=False).eval()
    except (KeyError, ValueError, OSError) as error:
        raise SourceError(
            f"{flag}: {path} must be a backbone of kdfast.train or ORION, or a chain's link (name "
            f"any other architecture with --model): {error}"
        ) from error


def is_random(name: str | None, checkpoint: str | None = None, *, pretrained: bool = False) -> bool:
    """Whether ``load_model`` leaves the weights of these arguments as they were drawn."""
    folder = name is None or name.startswith(HUGGING_FACE) or Path(name).is_dir()
    return not (folder or pretrained or checkpoint is not None)


def require_timm_name(name: str, flag: str = "--model", others: str = "") -> None:
    """Raises SourceError, which lists similar names, unless timm has a model of this name.

    Args:
        name: Value of the option, perhaps with the tag of pretrained weights after a point.
        flag: The option.
        others: What else the option takes, for the message.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise SourceError(f"{flag}: timm has no model {name!r}{others}{hint}")


def _named(name: str, pretrained: bool, classes: int | None) -> nn.Module:
    """The model of a name; ``classes``, if given, is the width of the classifier."""
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    folder = name.removeprefix(HUGGING_FACE)
    if name.startswith(HUGGING_FACE) and not Path(folder).is_dir():
        raise SourceError(f"--model: hf: takes a folder of save_pretrained, got {folder}")
    if Path(folder).is_dir():
        if pretrained:
            raise SourceError(
                f"--pretrained: belongs to names of timm and torchvision; {folder} is a folder"
            )
        return _of_folder(folder) if folder == name else _of_hugging_face(folder)
    if name.startswith(TORCHVISION):
        known = torchvision.models.list_models(include="vit_*")
        short = name.removeprefix(TORCHVISION)
        if short not in known:
            raise SourceError(f"--model: torchvision: must be one of {', '.join(known)}")
        weights = "DEFAULT" if pretrained else None
        return torchvision.models.get_model(short, weights=weights, **options)
    require_timm_name(name, others=f", and there is no folder {name}")
    return timm.create_model(name, pretrained=pretrained, **options)


def _of_folder(folder: str, flag: str = "--model") -> nn.Module:
    try:
        model: nn.Module = load_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(f"{flag}: {error}") from error
    return model


def _of_hugging_face(folder: str) -> nn.Module:
    try:
        model: nn.Module = load_headless(Path(folder))
    except ImportError as error:
        raise SourceError("--model: hf: needs transformers; pip install 'kdfast[hf]'") from error
    except (OSError, ValueError) as error:
        raise SourceError(
            f"--model: hf: {folder} must be written by transformers (give what kdfast.prune wrote "
            f"without hf:): {error}"
        ) from error
    return model


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Weights of a safetensors file or a PyTorch checkpoint, without running code from it.

    Averaged weights (EMA) go before the others, as in timm.

    Raises:
        SourceError: The file cannot be read, or holds no state dict.
    """
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(Path(path)).tensors
        state: Any = load_torch(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"--checkpoint: {path} cannot be read: {error}") from error
    for key in WEIGHTS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise SourceError(f"--checkpoint: {path} must hold a state dict")
    names = {str(key): str(key) for key in state}
    for prefix in WRAPPERS * 2:  # in any order
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    return {name: state[key] for key, name in names.items()}


def _classes(state: Mapping[str, Tensor]) -> int | None:
    """Width of the classifier in a state dict; 0 without one, None if it has another name."""
    for key in ("head.weight", "heads.head.weight", "classifier.weight"):
        if key in state:
            return state[key].shape[0]
    return 0 if not any(key.startswith("head") for key in state) else None
