# SPDX-License-Identifier: Apache-2.0
"""Which layers of two models can be compared: what one black image shows of them.

B batch, H heads, N tokens, D head dim, G windows of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from kdfast.matching.capture import Capture, Reader, readers
from kdfast.matching.features import FeatureRow
from kdfast.models.prepared import PreparedModel, input_config
from kdfast.nn.heads import AttentionCall
from kdfast.pruning.observe import frozen_eval

Size = tuple[int, int]


class Tokens(NamedTuple):
    """What the rows and columns of an attention map are.

    Attributes:
        windows: G, 1 where all tokens see each other.
        tokens: N, of a window.
        shift: How far the windows are shifted.
        grid: Whether a window's tokens are spread over the image, as in MaxViT's grids.
        units: Whether tokens are in Hiera's order of mask units, not in rows.
    """

    windows: int
    tokens: int
    shift: Size
    grid: bool
    units: bool

    def __str__(self) -> str:
        words = f"{self.windows} windows of {self.tokens} tokens"
        if self.windows == 1:
            words = f"{self.tokens} tokens"
        words += " spread over the image" if self.grid else ""
        words += f" shifted by {self.shift}" if any(self.shift) else ""
        return words + (" in the order of mask units" if self.units else "")


def paired_layers(students: int, teachers: int, layers: str) -> list[tuple[int, int]]:
    """Which layer of the student is compared with which one of the teacher.

    Args:
        students: Layers of the student, Ls.
        teachers: Layers of the teacher, Lt.
        layers: "all", or "last".

    Returns:
        Pairs (i, ceil((i + 1) Lt / Ls) - 1): the last layers always meet.
    """
    pairs = [(i, math.ceil((i + 1) * teachers / students) - 1) for i in range(students)]
    return pairs if layers == "all" else pairs[-1:]


class Maps(NamedTuple):
    """What one image shows of a model's attentions.

    Attributes:
        calls: The attentions whose maps can be read, in the order of the model.
        every: Of each attention by name, its reader, or why its maps cannot be read.
    """

    calls: dict[str, AttentionCall]
    every: dict[str, Reader | str]


def read_maps(model: PreparedModel, size: Size) -> Maps:
    """The attentions of a model whose maps can be read, on one black image.

    Raises:
        ValueError: The model does not run on such an image.
    """
    every = readers(model.net)
    paths = [path for path, reader in every.items() if not isinstance(reader, str)]
    seen = probed(model, size, paths, [])
    calls = {}
    for path in paths:
        try:
            if path not in seen.called:
                raise ValueError("its model does not call it")
            calls[path] = seen.call(path)
        except ValueError as error:
            every[path] = str(error)
    return Maps(calls, every)


def probed(
    model: PreparedModel,
    size: Size,
    attention: list[str],
    features: list[str],
    rows: Mapping[str, FeatureRow] | None = None,
) -> Capture:
    """What one black image leaves in a model, which stays as it is.

    Raises:
        ValueError: The model does not run on such an image, or a feature cannot be read.
    """
    image = torch.zeros(1, 3, *size, dtype=model.mean.dtype, device=model.mean.device)
    seen = Capture(model.net, attention, features, strict=False, rows=rows)
    try:
        with torch.no_grad(), frozen_eval(model), seen:
            model(image)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"it must run on images of {size[0]} x {size[1]}, got {type(error).__name__}: {error}"
        ) from error
    if missing := [name for name in features if name not in seen.features]:
        raise ValueError(f"its forward must pass {missing}, passes {list(seen.features)}")
    return seen


def own_size(student: PreparedModel, teacher: PreparedModel) -> Size:
    """(height, width) that both models can take: the student's own, or the teacher's."""
    height, width = input_config(student.net)["input_size"][1:]
    return student.size or teacher.size or (height, width)


def name_of(net: nn.Module) -> str:
    """timm's name of a model, or its class."""
    config: Any = getattr(net, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(net).__name__)


def tokens_between(net: nn.Module, name: str, call: AttentionCall) -> Tokens:
    """What the map of a call on one image is between."""
    path, _, leaf = name.rpartition(".")
    holders: list[Any] = [net.get_submodule(name), net.get_submodule(path)]
    windows, count = call.q.shape[0], call.q.shape[2]
    shift = next((h.shift_size for h in holders if hasattr(h, "shift_size")), (0, 0))
    if windows == 1:
        return Tokens(1, count, (0, 0), False, hasattr(net, "reroll"))
    above = (net.get_submodule(path.rsplit(".", i)[0]) for i in range(path.count(".") + 1))
    # MaxViT's grids; MobileViT attends among pixels at one place of every patch.
    grid = leaf == "attn_grid" or getattr(holders[1], "partition_block", True) is False
    grid |= any(hasattr(module, "patch_area") for module in above)
    down, right = (shift, shift) if isinstance(shift, int) else shift
    return Tokens(windows, count, (int(down), int(right)), grid, hasattr(net, "reroll"))
