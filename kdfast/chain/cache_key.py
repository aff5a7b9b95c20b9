# SPDX-License-Identifier: Apache-2.0
"""The key of a teacher cache: a description of everything that decides the kept logits.

A cache is used again only where the key of today equals the one that is saved with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from kdfast._version import __version__

# Switches that change how a model computes, not what.
_HOW = {"training", "grad_checkpointing"}


def teacher_key(teacher: nn.Module, facts: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Key of a cache: everything that decides its logits.

    Args:
        teacher: Its architecture, weights and buffers are hashed.
        facts: What identifies the data, as ``Classification.facts``.
        more: Anything else that changes the logits: normalisation, autocast.
    """
    return {
        "teacher": model_hash(teacher),
        **{f"data: {name}": value for name, value in facts.items()},
        **more,
        "torch": torch.__version__,
        "kdfast": __version__,
    }


def model_hash(model: nn.Module) -> str:
    """Hash of a model's modules, their plain attributes, parameters and buffers.

    Plain attributes are in it as the number of heads or a dropout rate leave no trace in the
    weights; whether gradients are needed, checkpointed or the mode is training are not.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        plain = {
            attribute: getattr(value, "__qualname__", value)
            for attribute, value in vars(module).items()
            if not attribute.startswith("_") and attribute not in _HOW
            if _plain(value) or isinstance(value, (type, FunctionType, BuiltinFunctionType))
        }
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        digest.update(f"{name}\0{kind}\0{sorted(plain.items())}\n".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def as_json(key: Mapping[str, Any]) -> dict[str, Any]:
    """The key in JSON types: what is written comes back as those, tuples as lists for example."""
    return json.loads(json.dumps(dict(key)))


def check_key(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError, naming what differs, unless a cache follows from what is wanted."""
    wanted = as_json(wanted)
    differing = [
        f"{name} (cached {found.get(name)!r}, now {wanted.get(name)!r})"
        for name in [*wanted, *sorted(set(found) - set(wanted))]
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(
            f"teacher cache: {directory} must follow from what is used now, but differs in "
            f"{'; '.join(differing)}; build it with rebuild=True or in another folder"
        )
