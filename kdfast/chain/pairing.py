# SPDX-License-Identifier: Apache-2.0
"""Which layers of a student are compared with which ones of its teacher, and whether they can be.

B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from kdfast.chain.links import LinkModel
from kdfast.configs.chain import ChainDistillConfig
from kdfast.matching.capture import attention_layers, reasons
from kdfast.matching.features import FeatureRow, timm_features
from kdfast.matching.layers import (
    Size,
    name_of,
    own_size,
    paired_layers,
    probed,
    read_maps,
    tokens_between,
)
from kdfast.matching.map_distance import relation_heads
from kdfast.nn.heads import AttentionCall
from kdfast.trainer.logs import LOG


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
        have, want = tokens_between(student.net, a, call), tokens_between(teacher.net, b, other)
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


def _calls(model: LinkModel, size: Size) -> list[tuple[str, AttentionCall]]:
    """The attentions whose maps can be read, in the order of the model."""
    name = name_of(model.net)
    attention_layers(model.net, name)  # before the model runs
    try:
        calls, every = read_maps(model, size)
    except ValueError as error:
        raise ValueError(f"distill.attention: {name}: {error}") from error
    why = reasons(model.net, every)
    if not calls:
        raise ValueError(
            f"distill.attention: {name} must have self-attention whose maps can be read, {why}"
        )
    if len(calls) < len(every):
        LOG.info("distill.attention: %s: %d attentions are read, %s", name, len(calls), why)
    return list(calls.items())


def _check_relation(config: ChainDistillConfig, layer: str, call: AttentionCall) -> None:
    if config.attention_map != "relation":
        return
    if call.bias is not None:
        raise ValueError(
            f"distill.attention_map: relation splits heads anew, but {layer} adds a position bias "
            "to each head; use groups"
        )
    relation_heads(call.q, config.relation_heads, layer)
