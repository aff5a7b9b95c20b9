# SPDX-License-Identifier: Apache-2.0
"""What a model is called with, from a batch of a loader. See docs/use/pruning.md. B batch."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Arguments of Hugging Face models that are for a loss, which is not the model's here.
_TARGETS = ("labels",)
# timm's NaFlexViT takes a dict with these names as its one argument.
_PATCHES = ("patches", "patch_coord", "patch_valid", "attn_mask")


@dataclass(frozen=True)
class Inputs:
    """Several inputs of one call; ``len`` is the number of images.

    Attributes:
        values: By name.
        named: Whether each is an argument; else the dict is the only one.
    """

    values: Mapping[str, Any]
    named: bool

    def __len__(self) -> int:
        return count(self.values.values())


def batches_of(data: Any) -> Iterable[Any]:
    """The batches of what a caller gave as data: a tensor or a dict alone is one batch."""
    return [data] if isinstance(data, (Tensor, Mapping)) else data


def count(values: Iterable[Any]) -> int:
    """B, the length of the first tensor among arguments of a call; 1 if there is none."""
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return len(value)
        if isinstance(value, Mapping) and any(isinstance(x, Tensor) for x in value.values()):
            return count(value.values())
    return 1


def outputs(model: nn.Module, images: Tensor | Inputs) -> Any:
    """The model's output."""
    if isinstance(images, Tensor):
        return model(images)
    return model(**images.values) if images.named else model(images.values)


def model_inputs(function: str, model: nn.Module, batch: Any) -> Tensor | Inputs:
    """What of a batch goes into the model.

    Args:
        function: Name of the caller, for messages.
        model: The model; its ``forward`` tells the names of its arguments.
        batch: A tensor, a dict, or a tuple or list that starts with one of them.

    Raises:
        TypeError: It is of another kind, or lacks an argument of the model.
        ValueError: It holds no image.
    """
    given = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    found: Tensor | Inputs | None = given if isinstance(given, Tensor) else None
    parameters = inspect.signature(model.forward).parameters.values()
    known = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(given, Mapping):
        found = _of_dict(given, [p.name for p in known])
    names = list(found.values) if isinstance(found, Inputs) and found.named else []
    needed = [p.name for p in known if p.default is p.empty and p.name not in names]
    # An input without a name is the first argument.
    missing = needed if names else needed[1:]
    if found is None or missing:
        want = f" and the model's {', '.join(missing)}" if found is not None else ""
        raise TypeError(
            f"{function}: a batch must be a tensor, a dict with a tensor 'image' or with the "
            f"model's arguments, or a list or tuple that starts with one{want}, got {_kind(batch)}"
        )
    if len(found) == 0:
        raise ValueError(f"{function}: a batch must hold at least one image, got none")
    return found


def _of_dict(given: Mapping[str, Any], known: list[str]) -> Tensor | Inputs | None:
    if isinstance(given.get("image"), Tensor):
        image: Tensor = given["image"]
        return image
    if isinstance(given.get("patches"), Tensor):
        return Inputs({name: given[name] for name in _PATCHES if name in given}, False)
    values = {n: x for n, x in given.items() if n in known and n not in _TARGETS}
    tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
    if not tensors:
        pixels = given.get("pixel_values")
        return pixels if isinstance(pixels, Tensor) else None
    first = next(iter(tensors))
    return tensors[first] if list(values) == known[:1] == [first] else Inputs(values, True)


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with {sorted(map(str, batch))}"
    return type(batch).__name__
