# SPDX-License-Identifier: Apache-2.0
"""The models and images that a command line names."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from kdfast.data.views.preprocess import preprocess
from kdfast.machine.files import load_torch
from kdfast.models.checkpoint import load_orion_backbone
from kdfast.models.eva import EVAViT

TORCHVISION, HUGGING_FACE = "torchvision:", "hf:"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
WEIGHTS = ("state_dict", "model", "student", "module")


class SourceError(ValueError):
    """A model or an image that a command line names cannot be used."""


def load_model(name: str | None, checkpoint: str | None, *, pretrained: bool = False) -> nn.Module:
    """The model of a name, a checkpoint, or a name with the weights of a checkpoint.

    Args:
        name: A timm name, ``torchvision:NAME`` or ``hf:FOLDER``; None: ``checkpoint`` says it: a
            file of ``save_backbone``, an ORION checkpoint, or a checkpoint of a chain's link.
        checkpoint: File of weights.
        pretrained: Download the weights of ``name``.

    Raises:
        SourceError: There is no such model or file, or they do not fit each other.
    """
    if name is None and checkpoint is None:
        raise SourceError("give --model, --checkpoint or both")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise SourceError(f"--checkpoint: there is no file {checkpoint}")
    if name is None:
        if (link := _chain_model(str(checkpoint))) is not None:
            return link.eval()
        try:
            return load_orion_backbone(str(checkpoint), with_cp=False).eval()
        except (KeyError, ValueError) as error:
            raise SourceError(
                f"--checkpoint: {checkpoint} must be a backbone of kdfast.train or ORION, or a "
                f"chain's link (name any other architecture with --model): {error}"
            ) from error
    state = None if checkpoint is None else read_state(checkpoint)
    model = _named(name, pretrained, None if state is None else _classes(state))
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise SourceError(f"--checkpoint: {checkpoint} must fit {name}: {error}") from error
    return model.eval()


def _chain_model(path: str) -> nn.Module | None:
    """The timm model of a chain's checkpoint, or None if the file is something else."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        state = load_torch(path, mmap=True)
        link, data = state["meta"]["link"], state["meta"]["data"]
    except (KeyError, TypeError, ValueError):
        return None
    # The averaged weights where there are such: they are what the chain evaluates.
    ema, prefix = state.get("ema"), "student.net."
    weights = state["module"] if ema is None else ema
    prefix = prefix if ema is None else "net."
    model = timm.create_model(link["model"], num_classes=len(data["classes"]), **link["args"])
    model.load_state_dict(
        {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
    )
    return model


def _named(name: str, pretrained: bool, classes: int | None) -> nn.Module:
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name.startswith(HUGGING_FACE):
        from transformers import AutoModel

        folder = name.removeprefix(HUGGING_FACE)
        if not Path(folder).is_dir():
            raise SourceError(f"--model: hf: takes a folder of save_pretrained, got {folder}")
        return AutoModel.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    if name.startswith(TORCHVISION):
        import torchvision

        known = torchvision.models.list_models(include="vit_*")
        short = name.removeprefix(TORCHVISION)
        if short not in known:
            raise SourceError(f"--model: torchvision: must be one of {', '.join(known)}")
        weights = "DEFAULT" if pretrained else None
        return torchvision.models.get_model(short, weights=weights, **options)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise SourceError(f"--model: timm has no model {name!r}{hint}")
    return timm.create_model(name, pretrained=pretrained, **options)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Weights of a safetensors file or a PyTorch checkpoint, without running code from it.

    Raises:
        SourceError: The file cannot be read, or holds no state dict.
    """
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        state: Any = load_torch(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"--checkpoint: {path} cannot be read: {error}") from error
    for key in WEIGHTS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise SourceError(f"--checkpoint: {path} must hold a state dict")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _classes(state: Mapping[str, Tensor]) -> int | None:
    for key in ("head.weight", "heads.head.weight", "classifier.weight"):
        if key in state:
            return state[key].shape[0]
    return 0 if not any(key.startswith("head") for key in state) else None


def transform_of(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """The model's own evaluation preprocessing: a picture to (3, H, W)."""
    if isinstance(model, EVAViT):
        side = int(model.config["img_size"])

        def orion(picture: Image.Image) -> Tensor:
            return preprocess(np.ascontiguousarray(np.asarray(picture)[..., ::-1]), (side, side))

        return orion
    if hasattr(model, "default_cfg") or hasattr(model, "pretrained_cfg"):
        config = resolve_model_data_config(model)
        embed: Any = getattr(model, "patch_embed", None)
        if getattr(embed, "img_size", None) is not None:
            # A model that was built for another size than its pretrained weights.
            config = {**config, "input_size": (3, *embed.img_size), "crop_pct": 1.0}
    else:
        facts = getattr(model, "config", model)
        side = int(getattr(facts, "image_size", 224))
        config = {"input_size": (3, side, side), **IMAGENET}
    return create_transform(**config, is_training=False)


def load_images(paths: Sequence[str], transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """(B, 3, H, W), preprocessed.

    Raises:
        SourceError: A file is missing or is no picture.
    """
    images = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                images.append(transform(picture.convert("RGB")))
        except FileNotFoundError as error:
            raise SourceError(f"--image: there is no file {path}") from error
        except (UnidentifiedImageError, OSError) as error:
            raise SourceError(f"--image: {path} is no picture that can be read") from error
    return torch.stack(images)
