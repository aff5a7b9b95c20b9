# SPDX-License-Identifier: Apache-2.0
"""The features of a model as tokens: its blocks, and what timm lists.

B batch, N positions, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from kdfast.nn.attention import height_of, qualified_name
from kdfast.pruning.constant import constant_blocks
from kdfast.pruning.families import anatomy_of

# Models whose maps are (B, h, w, C) although timm does not state it.
_CHANNELS_LAST = (
    "timm.models.volo.VOLO",
    "timm.models.vision_transformer_sam.VisionTransformerSAM",
)
# The stem of a convolutional network has no counterpart worth imitating.
_STEMS = ("act1", "relu", "bn1")


class FeatureRow(NamedTuple):
    """A layer whose output can be compared: a block, or what timm lists as a feature.

    Attributes:
        module: Its name.
        width: Its channels, C.
    """

    module: str
    width: int


def feature_rows(net: nn.Module) -> dict[str, FeatureRow]:
    """The layers that timm lists as features and that exist, by name."""
    info = getattr(net, "feature_info", None)
    rows = info if isinstance(info, list) else getattr(info, "info", [])
    names = dict(net.named_modules())
    return {
        row["module"]: FeatureRow(row["module"], row["num_chs"])
        for row in rows
        if row.get("module") and row["module"] in names and row["module"] not in _STEMS
    }


def timm_features(net: nn.Module, name: str) -> list[FeatureRow]:
    """The layers that timm lists as features.

    Args:
        net: The model.
        name: Its name, for the message.

    Raises:
        ValueError: timm lists none.
    """
    rows = list(feature_rows(net).values())
    if not rows:
        raise ValueError(f"distill.feature: timm must list features of {name}, lists none")
    return rows


def tokens_of(net: Any, row: FeatureRow, out: Any) -> Tensor:
    """(B, N, C) of a layer's output, positions row by row.

    The channels are where timm states them (``output_fmt``), else last in three dimensions and
    second in four, checked by their number.

    Args:
        net: The model.
        row: The layer.
        out: What its forward returned.

    Raises:
        ValueError: It is no tensor (B, N, C), (B, C, h, w) or (B, h, w, C) of so many channels.
    """
    if not isinstance(out, Tensor) or out.dim() not in (3, 4):
        got = f"{tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(f"{row.module} must give one tensor of 3 or 4 dimensions, gives {got}")
    last = _channels_last(net)
    axes = [-1] if out.dim() == 3 else [-1, 1] if last else [1, -1]
    axis = next((axis for axis in axes if out.shape[axis] == row.width), None)
    if axis is None:
        raise ValueError(f"{row.module} must give {row.width} channels, gives {tuple(out.shape)}")
    if out.dim() == 3:
        if hasattr(net, "reroll"):
            # Hiera orders tokens by mask units; this puts them back into rows.
            out = net.reroll(out, int(row.module.rpartition(".")[2])).flatten(1, -2)
        return out
    return out.flatten(1, 2) if axis == -1 else out.flatten(2).transpose(1, 2)


def _channels_last(net: nn.Module) -> bool:
    stated = getattr(net, "output_fmt", None)
    if stated is None:
        return qualified_name(net) in _CHANNELS_LAST
    return str(getattr(stated, "value", stated)) != "NCHW"


def block_rows(net: nn.Module) -> dict[str, FeatureRow]:
    """The blocks of a model that kdfast can prune, by name; of others what timm lists.

    Blocks that ``kdfast.drop_blocks`` replaced are among them.
    """
    names = {module: name for name, module in net.named_modules()}
    constant = constant_blocks(net)
    try:
        anatomy = anatomy_of("distil", net)
    except TypeError:
        return feature_rows(net)
    widths = {name: FeatureRow(name, width) for name, width in constant.items()}
    for block, site in zip(anatomy.blocks, anatomy.attentions, strict=True):
        name = names[block]
        widths[name] = FeatureRow(name, height_of(site.projection))
    return {name: widths[name] for name in names.values() if name in widths}
