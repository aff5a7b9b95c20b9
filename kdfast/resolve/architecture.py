# SPDX-License-Identifier: Apache-2.0
"""Models of timm and torchvision by their names, and classifiers of another width."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
from torch import nn

from kdfast.models.timm_args import check_timm
from kdfast.resolve.error import SourceError
from kdfast.resolve.near import TORCHVISION, did_you_mean, looks_like_path, torchvision_names
from kdfast.resolve.trained import find_trained


def check_name(name: str, flag: str) -> None:
    """Raises SourceError, which lists similar names, unless timm or torchvision has this model."""
    if name.startswith(TORCHVISION):
        if name.removeprefix(TORCHVISION) not in torchvision_names():
            raise SourceError(f"{flag}: torchvision has no model {name!r}{did_you_mean(name)}")
    elif looks_like_path(name):
        raise SourceError(f"{flag}: there is no file or folder {name}{did_you_mean(name)}")
    elif not timm.is_model(name):
        raise SourceError(
            f"{flag}: timm has no model {name!r}, and there is no folder or file of that name"
            f"{did_you_mean(name)}"
        )


def is_library_name(name: str) -> bool:
    """Whether timm or torchvision has a model of this name."""
    if name.startswith(TORCHVISION):
        return name.removeprefix(TORCHVISION) in torchvision_names()
    return bool(timm.is_model(name))


def of_library(name: str, flag: str, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """A model of timm or torchvision.

    Args:
        name: timm's name, or ``torchvision:NAME``.
        flag: The option that names it, for messages.
        pretrained: Download trained weights.
        **arguments: For its constructor, such as ``num_classes``.

    Raises:
        SourceError: There is no such model, or the library cannot build it.
    """
    check_name(name, flag)
    cached = find_trained(name, flag) if pretrained else None
    if cached is not None:
        # The file itself, since the hub's client asks the network about files that it has.
        arguments = {"pretrained_cfg_overlay": {"file": str(cached)}, **arguments}
    try:
        if name.startswith(TORCHVISION):
            return _of_torchvision(name.removeprefix(TORCHVISION), pretrained, arguments)
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
        return model
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
        given = {k: v for k, v in arguments.items() if k != "pretrained_cfg_overlay"}
        words = f" with {given}" if given else ""
        hint = "; without a network, name a local file of weights instead" if pretrained else ""
        raise SourceError(f"{flag}: {name}{words} cannot be built: {error}{hint}") from error


def _of_torchvision(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    classes = arguments.pop("num_classes", None) if pretrained else None
    weights = "DEFAULT" if pretrained else None
    model: nn.Module = torchvision.models.get_model(name, weights=weights, **arguments)
    return model if classes is None else with_classes(model, classes, name)


def described_in(content: Any) -> tuple[str, dict[str, Any]] | None:
    """The architecture that timm's trainer, DeiT's or a script like them wrote beside the weights.

    Args:
        content: What the file holds.

    Returns:
        Name and arguments; None where it names no model of timm.

    Raises:
        ValueError: Arguments are not timm's own, or no plain values.
    """
    if not isinstance(content, dict):
        return None
    options = content.get("args")
    facts = vars(options) if hasattr(options, "__dict__") else options
    facts = facts if isinstance(facts, dict) else {}
    name = content.get("arch") or facts.get("model") or facts.get("arch")
    if not isinstance(name, str) or not timm.is_model(name):
        return None
    arguments = dict(facts.get("model_kwargs") or {})
    for key, own in (("img_size", "img_size"), ("in_chans", "in_chans"), ("gp", "global_pool")):
        if facts.get(key) is not None:
            arguments.setdefault(own, facts[key])
    plain = name.split(".")[0]
    check_timm(plain, arguments)
    return plain, arguments


def classifiers(model: nn.Module) -> list[str]:
    """Names of the layers that give a model's classes; none where it has no classifier."""
    config: Any = getattr(model, "pretrained_cfg", None)
    if config is not None:
        found = config.get("classifier") or ()
        names = (found,) if isinstance(found, str) else tuple(found)
        known = dict(model.named_modules())
        return [name for name in names if name in known]
    whole = hasattr(model, "config") and not _classifies(model)
    leaves = [name for name, layer in model.named_modules() if not layer._modules]
    ends = isinstance(model.get_submodule(leaves[-1]), nn.Linear)
    return leaves[-1:] if ends and not whole else []


def _classifies(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForImageClassification")


def class_count(model: nn.Module) -> int:
    """Number of a model's classes; 0 where it has no classifier."""
    layers = [model.get_submodule(name) for name in classifiers(model)]
    stated: Any = getattr(model, "num_classes", None)  # of classifiers that are convolutions
    return next((x.out_features for x in layers if isinstance(x, nn.Linear)), stated or 0)


def with_classes(model: nn.Module, classes: int, name: str) -> nn.Module:
    """The model with a new classifier of so many classes, where it has another one.

    Raises:
        SourceError: It has no linear classifier that could be replaced.
    """
    if class_count(model) == classes:
        return model
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is not None:
        reset(classes)
        return model
    names = classifiers(model)
    if not names:
        raise SourceError(f"{name} has no classifier that could be given {classes} classes")
    owner, _, leaf = names[0].rpartition(".")
    old: Any = model.get_submodule(names[0])
    new = nn.Linear(old.in_features, classes, old.bias is not None)
    setattr(model.get_submodule(owner), leaf, new)
    kept: Any = model  # what the library itself keeps of the number
    if hasattr(model, "config"):
        kept.config.num_labels = classes
    elif hasattr(model, "num_classes"):
        kept.num_classes = classes
    return model


def meta(name: str, flag: str, **arguments: Any) -> nn.Module:
    """A model without memory."""
    with torch.device("meta"):
        return of_library(name, flag, **arguments)
