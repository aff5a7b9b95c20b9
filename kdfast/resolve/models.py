# SPDX-License-Identifier: Apache-2.0
"""The model that a name stands for, wherever one is asked for: on a command line or in a config.

See docs/use/models.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from kdfast.models.checkpoint import load_orion_backbone
from kdfast.models.eva import EVAViT
from kdfast.models.image_processor import guessed
from kdfast.pruning.folder import CONFIG, PICKLED, WEIGHTS
from kdfast.pruning.hf_folder import load_transformers
from kdfast.pruning.saving import load_pretrained
from kdfast.resolve.architecture import (
    check_name,
    classifiers,
    described_in,
    meta,
    of_library,
    with_classes,
)
from kdfast.resolve.error import SourceError
from kdfast.resolve.hub import hub_folder
from kdfast.resolve.link_file import model_of
from kdfast.resolve.near import HUGGING_FACE, TORCHVISION
from kdfast.resolve.state import Fitted, fitted, prefix_of, read_checkpoint, state_of

LOG = logging.getLogger("kdfast")
# Weights beside a configuration belong to the model of their folder.
IN_FOLDERS = (WEIGHTS, PICKLED)


class Flags(NamedTuple):
    """The options that name a model and the file of its weights, for messages."""

    model: str = "--model"
    weights: str = "--checkpoint"


def load_model(
    name: str | None,
    checkpoint: str | None = None,
    pretrained: bool = False,
    *,
    flag: str = "--model",
    weights_flag: str = "--checkpoint",
    classes: int | None = None,
    **arguments: Any,
) -> nn.Module:
    """The model of a name, of a checkpoint, or of a name with the weights of a checkpoint.

    Args:
        name: A timm name; ``torchvision:NAME``; ``hf:NAME`` of Hugging Face's hub or its cache; a
            folder of ``save_pretrained`` (``--out`` of ``kdfast prune``), timm or Hugging Face,
            with or without ``hf:``; or a file that says its architecture: of a recovery run, ORION,
            a chain's link, timm's trainer or DeiT's. None: ``checkpoint`` is such a file or folder.
        checkpoint: A file with weights for ``name``, of any of these, whatever wrappers put before
            its names; position embeddings of other sizes are resized as the library does.
        pretrained: Download the weights of a name of timm or torchvision.
        flag: The option that names the model, for messages.
        weights_flag: Likewise the one that names ``checkpoint``.
        classes: Width of the classifier, which starts anew where the weights have another; None: as
            the weights have it, 0 (no classifier) where they have none.
        **arguments: For the constructor of a model of timm or torchvision, such as ``img_size``.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        SourceError: There is no such model or file, or they do not fit each other.
    """
    flags = Flags(flag, weights_flag)
    if name is None:
        if checkpoint is None:
            raise SourceError(f"give {flag}, {weights_flag} or both")
        name, checkpoint, flag = checkpoint, None, weights_flag
    saved = is_saved(name)
    if saved and pretrained and not name.startswith(HUGGING_FACE):
        raise SourceError(
            f"--pretrained: belongs to names of timm and torchvision; {name} has its weights"
        )
    if saved and arguments:
        raise SourceError(f"{flag}: {name} is a saved model, which takes no {', '.join(arguments)}")
    if checkpoint is not None:
        model = _with_weights(name, checkpoint, flags, classes, arguments)
    elif saved:
        model = _saved(name, flag, flags)
    else:
        more = arguments if classes is None else {**arguments, "num_classes": classes}
        return of_library(name, flag, pretrained=pretrained, **more).eval()
    try:
        return (model if classes is None else with_classes(model, classes, name)).eval()
    except SourceError as error:
        raise SourceError(f"{flag}: {error}") from error


def load_state(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Fill a model with weights; a classifier that does not fit starts anew.

    Args:
        model: As ``load_model`` makes it. Without memory it is only compared with the weights.
        state: Result of ``state_of``.
        origin: The file of the weights, for notes.

    Raises:
        ValueError: They are of another model.
    """
    _fill(model, fitted(state, model, classifiers(model)), origin)


def _fill(model: nn.Module, found: Fitted, origin: str) -> None:
    if next(model.parameters()).is_meta:
        return
    model.load_state_dict(found.tensors)
    for note in found.notes:
        LOG.warning("note: %s: %s", origin, note)


def load_saved(path: str | Path, flag: str = "--checkpoint") -> nn.Module:
    """The model of a file or folder that says its own architecture; as ``load_model``.

    The name of a library's model is one too, with random weights, and a word about them.
    """
    model = load_model(str(path), flag=flag)
    if is_random(str(path)):
        LOG.warning("note: %s %s: a model's name, so it has random weights", flag, path)
    return model


def is_saved(name: str) -> bool:
    """Whether a name stands for a file, a folder or a model of the hub, which have their weights.

    Folders named as a model of timm count only where they hold a model.
    """
    if name.startswith(HUGGING_FACE):
        return True
    path = Path(name).expanduser()
    if path.is_dir() and not name.startswith(TORCHVISION):
        return (path / CONFIG).is_file() or not timm.is_model(name)
    return path.is_file()


def is_random(name: str | None, checkpoint: str | None = None, *, pretrained: bool = False) -> bool:
    """Whether ``load_model`` leaves the weights of these arguments as they were drawn."""
    return not (pretrained or checkpoint is not None or name is None or is_saved(name))


def check_model_name(name: str, flag: str = "--model") -> None:
    """Raises SourceError, which lists what is similar, unless ``load_model`` could find a name."""
    if not is_saved(name):
        check_name(name, flag)


def file_name(name: str) -> str:
    """A model's name as part of the name of a file."""
    short = name
    if is_saved(name) and not name.startswith(HUGGING_FACE):
        path = Path(name).expanduser()
        short = path.stem if path.is_file() else path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", short).strip("._")[:80] or "model"


def _saved(name: str, flag: str, flags: Flags) -> nn.Module:
    """A saved model, named by ``flag``; without memory where the caller builds models so."""
    with torch.device("cpu"):
        model = _read(name, flag, flags)
    return model.to("meta") if torch.get_default_device().type == "meta" else model


def _read(name: str, flag: str, flags: Flags) -> nn.Module:
    if name.startswith(HUGGING_FACE):
        rest = name.removeprefix(HUGGING_FACE)
        folder = Path(rest).expanduser()
        return _of_folder(folder if folder.is_dir() else hub_folder(rest, flag), flag)
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_folder(path, flag)
    if path.name in IN_FOLDERS and (path.parent / CONFIG).is_file():
        return _of_folder(path.parent, flag)
    try:
        return _of_file(path, flag, flags)
    except SourceError:
        raise
    except (KeyError, ValueError, OSError) as error:
        raise SourceError(f"{flag}: {error}") from error


def _of_folder(folder: Path, flag: str) -> nn.Module:
    try:
        found: Any = load_transformers(folder)
        if found is None:
            found = load_pretrained(folder)
    except ImportError as error:
        text = f"{flag}: {folder} needs transformers; pip install 'kdfast[hf]'"
        raise SourceError(text) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{flag}: {str(error).removeprefix('load_pretrained: ')}") from error
    if not isinstance(found, EVAViT) and (word := guessed(getattr(found, "config", None))):
        LOG.warning("note: %s: %s", folder, word)
    model: nn.Module = found
    return model


def _of_file(path: Path, flag: str, flags: Flags) -> nn.Module:
    """The model of a file that says its architecture."""
    if (link := model_of(path)) is not None:
        return link
    content = read_checkpoint(path)
    state = state_of(content)
    if (known := described_in(content)) is not None:
        name, arguments = known
        return _filled(name, str(path), content, Flags(flag, flag), None, arguments)
    if any(key.endswith("blocks.0.attn.q_proj.weight") for key in state):
        return load_orion_backbone(path, with_cp=False)
    likely = [name for name in timm.list_models() if path.stem.startswith(name)]
    hint = max(likely, key=len, default="NAME")
    raise ValueError(
        f"{path} holds weights without their architecture, it is no file of kdfast.train, ORION, a "
        f"chain's link or timm's trainer; say what they are for: {flags.model} {hint} "
        f"{flags.weights} {path}"
    )


def _with_weights(
    name: str, checkpoint: str, flags: Flags, classes: int | None, arguments: dict[str, Any]
) -> nn.Module:
    """The architecture of a name with the weights of a file."""
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise SourceError(f"{flags.weights}: there is no file {checkpoint}")
    try:
        content = read_checkpoint(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{flags.weights}: {path} cannot be read: {error}") from error
    return _filled(name, checkpoint, content, flags, classes, arguments)


def _filled(
    name: str,
    checkpoint: str,
    content: Any,
    flags: Flags,
    classes: int | None,
    arguments: dict[str, Any],
) -> nn.Module:
    """A model with the weights of what a file holds."""
    try:
        state = state_of(content)
        if is_saved(name):
            model = _saved(name, flags.model, flags)
        else:
            count = _classes(name, state, flags.model, arguments)
            more = arguments if count is None else {**arguments, "num_classes": count}
            model = of_library(name, flags.model, **more)
        _fill(model, fitted(state, model), checkpoint)
    except SourceError:
        raise
    except (RuntimeError, ValueError) as error:
        raise SourceError(f"{flags.weights}: {checkpoint} must fit {name}: {error}") from error
    return model


def _classes(
    name: str, state: dict[str, Tensor], flag: str, arguments: dict[str, Any]
) -> int | None:
    """Width of the classifier in weights; 0 without one, None where the model has none."""
    plan = meta(name, flag, **arguments)
    prefix, own = prefix_of(state, plan.state_dict()), classifiers(plan)
    for layer in own:
        if (weight := state.get(f"{prefix}{layer}.weight")) is not None:
            return int(weight.shape[0])
    if not own or name.startswith(TORCHVISION):
        return None  # torchvision has no models without a classifier
    return 0
