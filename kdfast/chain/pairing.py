# SPDX-License-Identifier: Apache-2.0
"""Which layers of a student are compared with which ones of its teacher, and whether they can be.

B batch, H heads, N tokens, D head dim, G windows of an image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.chain.capture import Capture, attention_layers, readers, reasons
from kdfast.chain.features import FeatureRow, timm_features
from kdfast.chain.links import LinkModel
from kdfast.configs.chain import ChainDistillConfig
from kdfast.nn.heads import AttentionCall
from kdfast.pruning.observe import frozen_eval
from kdfast.trainer.logs import LOG

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


def attention_pairs(
    student: LinkModel, teacher: LinkModel, config: ChainDistillConfig, size: Size | None
) -> list[tuple[str, str]]:
    """Names of the attentions whose maps are compared.

    Both models run once, on one black image.

    Args:
        student: The model that is trained.
        teacher: The model that it imitates.
        config: Says which layers, and how their maps.
        size: (height, width) of the images to come; None: those that the models are made for.

    Raises:
        ValueError: A model has no maps that can be read, or two that would be compared are not of
            the same tokens; the message names model and reason.
    """
    size = size or own_size(student, teacher)
    names = [name_of(model.net) for model in (student, teacher)]
    mine, theirs = (_calls(model, size) for model in (student, teacher))
    pairs = []
    for i, j in paired_layers(len(mine), len(theirs), config.layers):
        (a, call), (b, other) = mine[i], theirs[j]
        have, want = _tokens(student.net, a, call), _tokens(teacher.net, b, other)
        if have != want:
            raise ValueError(
                f"distill.attention: {a} of {names[0]} must attend among the tokens that {b} of "
                f"{names[1]} does, got {have} and {want}"
            )
        for name, layer, inputs in ((names[0], a, call), (names[1], b, other)):
            _check_relation(config, f"{layer} of {name}", inputs)
        pairs.append((a, b))
    return pairs


def feature_pairs(
    student: LinkModel, teacher: LinkModel, config: ChainDistillConfig, size: Size | None
) -> list[tuple[FeatureRow, FeatureRow]]:
    """The layers whose outputs are compared.

    Args:
        student: The model that is trained.
        teacher: The model that it imitates.
        config: Says which layers.
        size: As in ``attention_pairs``.

    Raises:
        ValueError: timm lists no features of a model, one that would be compared is no tensor of
            features, or two are of another number of positions.
    """
    size = size or own_size(student, teacher)
    names = [name_of(model.net) for model in (student, teacher)]
    mine, theirs = (timm_features(m.net, n) for m, n in zip((student, teacher), names, strict=True))
    pairs = [(mine[i], theirs[j]) for i, j in paired_layers(len(mine), len(theirs), config.layers)]
    counts = []
    for model, rows in ((student, [s for s, _ in pairs]), (teacher, [t for _, t in pairs])):
        try:
            seen = probed(model, size, [], [row.module for row in rows]).features
        except ValueError as error:
            raise ValueError(f"distill.feature: {name_of(model.net)}: {error}") from error
        counts.append([seen[row.module].shape[1] for row in rows])
    for (a, b), have, want in zip(pairs, *counts, strict=True):
        if have != want:
            raise ValueError(
                f"distill.feature: {a.module} of {names[0]} must have as many positions as "
                f"{b.module} of {names[1]}, got {have} and {want}"
            )
    return pairs


def probed(model: LinkModel, size: Size, attention: list[str], features: list[str]) -> Capture:
    """What one black image leaves in a model, which stays as it is.

    Raises:
        ValueError: The model does not run on such an image, or a feature cannot be read.
    """
    image = torch.zeros(1, 3, *size, dtype=model.mean.dtype, device=model.mean.device)
    seen = Capture(model.net, attention, features, strict=False)
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


def own_size(student: LinkModel, teacher: LinkModel) -> Size:
    """(height, width) that both models can take: the student's own, or the teacher's."""
    config: Any = getattr(student.net, "pretrained_cfg", None) or {}
    height, width = config.get("input_size", (3, 224, 224))[1:]
    return student.size or teacher.size or (int(height), int(width))


def name_of(net: nn.Module) -> str:
    """timm's name of a model, or its class."""
    config: Any = getattr(net, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(net).__name__)


def _calls(model: LinkModel, size: Size) -> list[tuple[str, AttentionCall]]:
    """The attentions whose maps can be read, in the order of the model."""
    name, every = name_of(model.net), readers(model.net)
    paths = attention_layers(model.net, name)
    try:
        seen = probed(model, size, paths, [])
    except ValueError as error:
        raise ValueError(f"distill.attention: {name}: {error}") from error
    calls = []
    for path in paths:
        try:
            if path not in seen.called:
                raise ValueError("its model does not call it")
            calls.append((path, seen.call(path)))
        except ValueError as error:
            every[path] = str(error)
    why = reasons(model.net, every)
    if not calls:
        raise ValueError(
            f"distill.attention: {name} must have self-attention whose maps can be read, {why}"
        )
    if len(calls) < len(every):
        LOG.info("distill.attention: %s: %d attentions are read, %s", name, len(calls), why)
    return calls


def _tokens(net: nn.Module, name: str, call: AttentionCall) -> Tokens:
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


def _check_relation(config: ChainDistillConfig, layer: str, call: AttentionCall) -> None:
    if config.attention_map != "relation":
        return
    if call.bias is not None:
        raise ValueError(
            f"distill.attention_map: relation splits heads anew, but {layer} adds a position bias "
            "to each head; use groups"
        )
    relation_heads(call.q, config.relation_heads, layer)


def head_groups(students: int, teachers: int) -> list[int]:
    """The teacher head that each student head imitates: the first one of its group."""
    return [i * teachers // students for i in range(students)]


def relation_heads(x: Tensor, count: int, what: str) -> Tensor:
    """(B, H, N, D) as ``count`` heads (B, R, N, H D / R) over the concatenation of all heads.

    Raises:
        ValueError: R does not divide H D.
    """
    b, h, n, d = x.shape
    if h * d % count:
        raise ValueError(
            f"distill.relation_heads: must divide the width {h * d} of {what}, got {count}"
        )
    return x.transpose(1, 2).reshape(b, n, count, h * d // count).transpose(1, 2)
