# SPDX-License-Identifier: Apache-2.0
"""State dicts of checkpoints as training scripts write them, and how they become a model's own.

Wrappers of models put words before names, scripts put the weights below entries of their own, and a
model for other images has other position embeddings: all of that is undone here, and nothing else.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from kdfast.machine.archive import is_archive
from kdfast.machine.files import load_torch
from kdfast.machine.weights import weight_problems
from kdfast.models.checkpoint import is_safetensors
from kdfast.pruning.folder import read_safetensors
from kdfast.resolve.link_file import is_link, weights_of

# Entries under which training scripts put the weights, the outermost first, averaged ones before.
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "module")
# What wrappers put into names, wherever the wrapped part is.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
SHOWN = 4


class Fitted(NamedTuple):
    """Weights under a model's own names.

    Attributes:
        tensors: By name.
        notes: One line for everything that was changed or left out.
    """

    tensors: dict[str, Tensor]
    notes: list[str]


def read_checkpoint(path: Path) -> Any:
    """What a file of weights holds, without running code from it.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged, of another kind, or would need its code to be run.
    """
    if is_safetensors(path):
        return read_safetensors(path).tensors
    return load_torch(path, mmap=is_archive(path))


def state_of(content: Any) -> dict[str, Tensor]:
    """The weights in a checkpoint; averaged ones (EMA) go before the others, as in timm.

    Raises:
        ValueError: It holds no state dict.
    """
    if is_link(content):
        return weights_of(content)
    for key in ENTRIES:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"it must hold a state dict, got {type(content).__name__}")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or not all(isinstance(name, str) for name in content):
        raise ValueError(f"it must hold a state dict, got entries {_some(map(str, content))}")
    for wrapper in WRAPPERS:
        tensors = {name.replace(wrapper, ""): value for name, value in tensors.items()}
    return tensors


def prefix_of(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands before a model's names in a checkpoint, such as ``module.`` or ``backbone.``.

    Raises:
        ValueError: There are several such models.
    """
    known, found = set(wanted), Counter[str]()
    for name in names:
        start = 0
        while name[start:] not in known:
            start = name.find(".", start) + 1
            if not start:
                break
        else:
            found[name[:start]] += 1
    ranked = found.most_common(2)
    if len(ranked) == 2 and ranked[1][1] > 0.9 * ranked[0][1] and "" not in dict(ranked):
        first, second = sorted(dict(ranked))
        raise ValueError(
            f"it holds two such models, under {first!r} and {second!r}; save the weights of one"
        )
    return ranked[0][0] if ranked else ""


def fitted(
    state: Mapping[str, Tensor], model: nn.Module, classifiers: Iterable[str] = ()
) -> Fitted:
    """The weights of a checkpoint under the names and in the shapes of a model.

    Args:
        state: Result of ``state_of``.
        model: The architecture; position embeddings are resized to it as its library does.
        classifiers: Layers that keep the model's own weights where the checkpoint has them in
            another shape or not at all.

    Raises:
        ValueError: They are of another model; the message lists what differs.
    """
    own = model.state_dict()
    prefix, notes = prefix_of(state, own), []
    inner = {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}
    if len(inner) < len(state):
        left = [name for name in state if not name.startswith(prefix)]
        notes.append(f"not used: {_some(left)} (only names that start with {prefix!r} are)")
    for name in [f"{layer}.{x}" for layer in classifiers for x in ("weight", "bias")]:
        if name in own and (name not in inner or inner[name].shape != own[name].shape):
            inner[name] = own[name]
            notes += ["the classifier starts anew"] * name.endswith("weight")
    if _differences(inner, own):
        converted = _converted(inner, model)
        if len(_differences(converted, own)) < len(_differences(inner, own)):
            notes += [
                f"{name} resized from {tuple(inner[name].shape)} to {tuple(x.shape)}"
                for name, x in converted.items()
                if name in inner and inner[name].shape != x.shape
            ]
            inner = converted
    if problems := _differences(inner, own) or weight_problems(inner, own):
        raise ValueError("; ".join(problems))
    return Fitted(inner, notes)


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What is missing, not expected and of another shape, each with a few names."""
    groups = {
        "missing": [name for name in own if name not in state],
        "not expected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(x.shape)} for {tuple(own[name].shape)}"
            for name, x in state.items()
            if name in own and x.shape != own[name].shape
        ],
    }
    return [f"{kind}: {_some(names)}" for kind, names in groups.items() if names]


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights after the model's library has renamed and resized what it knows."""
    try:
        if isinstance(model, torchvision.models.VisionTransformer):
            return dict(interpolate_embeddings(model.image_size, model.patch_size, dict(state)))
        convert = _timm_filter(model, state)
        return state if convert is None else dict(convert(dict(state), model))
    except Exception:  # they stumble over names of other models, which the caller lists
        return state


def _timm_filter(model: nn.Module, state: Mapping[str, Tensor]) -> Any:
    """timm's function that turns older checkpoints of a model's file into its own form."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    if not name or not timm.is_model(name):
        return None
    module = sys.modules[timm.models.model_entrypoint(name).__module__]
    found: Any = getattr(module, "checkpoint_filter_fn", None)
    # DeiT-III's scales of layers had other names.
    if found is not None and any("gamma_" in key for key in state):
        if "adapt_layer_scale" in inspect.signature(found).parameters:
            return lambda state, model: found(state, model, adapt_layer_scale=True)
    return found


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN:,} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
