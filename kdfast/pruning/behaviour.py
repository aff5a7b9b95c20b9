# SPDX-License-Identifier: Apache-2.0
"""What a model computes with besides its tensors: classes of modules, and their plain attributes.

See docs/use/pruning.md.
"""

from collections.abc import Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from kdfast.nn.attention import FusedAttention
from kdfast.pruning.hf_adapter import NoHeads

# Modules that change nothing in eval mode.
_NOTHING = ("Dropout", "DropPath", "Identity")
# Attributes that say how something is computed, not what; ``heads`` are in the section itself.
_HOW = {
    *("training", "fused_attn", "grad_checkpointing", "gradient_checkpointing", "with_cp"),
    *("backend", "source", "heads", "kept_heads"),
}


class Differences(NamedTuple):
    """How two models differ that should compute the same.

    Attributes:
        problems: One line for each thing that no file can hold.
        attributes: By name of the module, then of the attribute, the first model's JSON values.
    """

    problems: list[str]
    attributes: dict[str, dict[str, Any]]


def behaviour_differences(model: nn.Module, again: nn.Module) -> Differences:
    """Classes and attributes of a model that are others in the one that was built in its place."""
    others = dict(again.named_modules())
    problems: list[str] = []
    changed: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        label = name or "the model itself"
        if "forward" in module.__dict__:
            problems.append(f"{label} has a forward of its own")
        other = others.pop(name, None)
        kinds = [_kind(some) for some in (module, other)]
        if None not in kinds and kinds[0] != kinds[1]:
            problems.append(f"{label} is a {kinds[0]}, but {kinds[1]} is built")
        if other is None:
            continue
        mine, theirs = (_attributes(some) for some in (module, other))
        for key, value in mine.items():
            if key not in theirs or value == theirs[key]:
                continue
            if isinstance(value, _Function) or not _finite(value):
                problems.append(f"{label} has {key} {value}, but {theirs[key]} is built")
            else:
                changed.setdefault(name, {})[key] = value
    problems += [
        f"{name} is missing, but {_kind(other)} is built"
        for name, other in others.items()
        if _kind(other) not in (None, "nothing")
    ]
    return Differences(problems, changed)


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives modules the attributes that ``behaviour_differences`` found.

    Only attributes that are there and that are plain values already are set.

    Raises:
        ValueError: One is not.
    """
    modules = dict(model.named_modules())
    groups = attributes if isinstance(attributes, dict) else {"": attributes}
    if not all(isinstance(found, dict) for found in groups.values()):
        raise ValueError(
            f"load_pretrained: config.json must set plain attributes by module, got {attributes!r}"
        )
    for name, key in [(name, key) for name, found in groups.items() for key in found]:
        value, known = groups[name][key], _attributes(modules.get(name))
        fits = key in known and not isinstance(known[key], _Function) and _like(known[key], value)
        if not fits or not _plain(value):
            raise ValueError(
                f"load_pretrained: config.json must set plain attributes that are there, got "
                f"{f'{name}.{key}'.lstrip('.')} = {value!r}"
            )
        old = modules[name].__dict__[key]
        if isinstance(value, list) and isinstance(old, tuple):
            value = _tuples(value)
        modules[name].__dict__[key] = value


def _like(old: Any, new: Any) -> bool:
    """Whether a value may take the place of another: one of its kind, or nothing."""
    if old is None or new is None or type(old) is type(new):
        return True
    numbers = (int, float)
    return type(old) in numbers and type(new) in numbers


class _Function(str):
    """The name of a function that is an attribute."""


def _kind(module: nn.Module | None) -> str | None:
    """The class that matters in eval mode; None where it says nothing: stand-ins, no module."""
    if module is None or isinstance(module, FusedAttention | NoHeads):
        return None
    if type(module).__name__ in _NOTHING:
        return "nothing"
    # A layer that accelerate gave a class of its own is the one that it was.
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
    return next(name for name in names if not name.startswith("kdfast.nn."))


def _attributes(module: nn.Module | None) -> dict[str, Any]:
    """The attributes of a module that are plain values, as JSON has them, or functions."""
    found: dict[str, Any] = {}
    for name, value in ({} if module is None else module.__dict__).items():
        if name.startswith("_") or name in _HOW:
            continue
        if isinstance(value, FunctionType | BuiltinFunctionType):
            found[name] = _Function(f"{value.__module__}.{value.__qualname__}")
        elif _plain(value):
            found[name] = _lists(value)
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _lists(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_lists(x) for x in value]
    return value.value if isinstance(value, Enum) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value


def _finite(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or value - value == 0
