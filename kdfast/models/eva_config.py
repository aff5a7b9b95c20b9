# SPDX-License-Identifier: Apache-2.0
"""Checks of EVAViT's constructor arguments."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

# Arguments that ORION takes without effect, or whose feature its backbone leaves unused.
ONLY: dict[str, Any] = {
    "norm_layer": None,
    "act_layer": None,
    "use_rel_pos": False,
    "rope": True,
    "global_window_size": 0,
    "residual_block_indexes": [],
    "out_feature": "last_feat",
    "subln": False,
}
ORION_NORM = (nn.LayerNorm, {"eps": 1e-6})
POSITIVE = (
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "pt_hw_seq_len",
    "pretrain_img_size",
)


def checked_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments as plain JSON values, ``heads`` and ``mlp_hidden`` per block.

    Args:
        arguments: Every argument of ``EVAViT``.

    Raises:
        TypeError: ``heads`` or ``mlp_hidden`` are not integers.
        ValueError: A value does not fit.
        NotImplementedError: An argument that can have only one value has another.
    """
    config = dict(arguments)
    norm = config["norm_layer"]
    if isinstance(norm, functools.partial) and (norm.func, norm.keywords) == ORION_NORM:
        config["norm_layer"] = None
    if config["act_layer"] is nn.GELU:
        config["act_layer"] = None
    for name in ("window_block_indexes", "residual_block_indexes"):
        config[name] = sorted({int(i) for i in config[name]})
    for name, value in ONLY.items():
        if config[name] != value:
            raise NotImplementedError(f"EVAViT: {name} must be {value!r}, got {config[name]!r}")
    del config["norm_layer"], config["act_layer"]
    _check_sizes(config)
    config["heads"] = head_lists(config["heads"], config["depth"], config["num_heads"])
    full = int(config["embed_dim"] * config["mlp_ratio"])
    config["mlp_hidden"] = mlp_widths(config["mlp_hidden"], config["depth"], full)
    return config


def _check_sizes(config: Mapping[str, Any]) -> None:
    for name in POSITIVE:
        if config[name] < 1:
            raise ValueError(f"EVAViT: {name} must be at least 1, got {config[name]}")
    dim, heads, depth = config["embed_dim"], config["num_heads"], config["depth"]
    if dim % heads or dim // heads % 4:
        raise ValueError(
            "EVAViT: embed_dim / num_heads must be a multiple of 4 (two rotary axes of channel "
            f"pairs), got {dim} / {heads}"
        )
    for name in ("img_size", "pretrain_img_size"):
        if config[name] < config["patch_size"]:
            raise ValueError(
                f"EVAViT: {name} must be at least patch_size = {config['patch_size']}, "
                f"got {config[name]}"
            )
    if int(dim * config["mlp_ratio"]) < 1:
        raise ValueError(f"EVAViT: mlp_ratio must be positive, got {config['mlp_ratio']}")
    if not 0 <= config["drop_path_rate"] < 1:
        raise ValueError(
            f"EVAViT: drop_path_rate must be in [0, 1), got {config['drop_path_rate']}"
        )
    windows = config["window_block_indexes"]
    if windows and not (0 <= windows[0] and windows[-1] < depth):
        raise ValueError(f"EVAViT: window_block_indexes must be in [0, {depth}), got {windows}")
    if config["window_size"] < bool(windows):
        raise ValueError(
            "EVAViT: window_size must be at least 1 where blocks have windows, "
            f"got {config['window_size']}"
        )


def head_lists(
    heads: Sequence[Sequence[int]] | Sequence[int] | None, depth: int, num_heads: int
) -> list[list[int]]:
    """Kept heads of every block.

    Args:
        heads: A list per block, one list for all blocks, or None for every head.
        depth: Number of blocks.
        num_heads: Heads per block before pruning.

    Raises:
        TypeError: Not integers.
        ValueError: Not one list per block; a list that is out of range or not strictly ascending,
            or the one list for all blocks is empty.
    """
    entries: list[Any] = list(range(num_heads) if heads is None else heads)
    if entries and all(type(entry) is int for entry in entries):
        entries = [entries] * depth
    if len(entries) != depth:
        raise ValueError(
            f"EVAViT: heads must be a list per block ({depth}) or one list of heads for all, "
            f"got {len(entries)} entries"
        )
    lists: list[list[int]] = []
    for block, entry in enumerate(entries):
        if not isinstance(entry, Sequence) or not all(type(h) is int for h in entry):
            raise TypeError(f"EVAViT: heads[{block}] must be a list of ints, got {entry!r}")
        kept = list(entry)
        ascending = all(a < b for a, b in zip(kept, kept[1:], strict=False))
        if not ascending or (kept and (kept[0] < 0 or kept[-1] >= num_heads)):
            raise ValueError(
                f"EVAViT: heads[{block}] must name heads of [0, {num_heads}) in ascending order, "
                f"got {kept}"
            )
        lists.append(kept)
    return lists


def mlp_widths(widths: Sequence[int] | int | None, depth: int, full: int) -> list[int]:
    """Hidden units of every block's MLP.

    Args:
        widths: A width per block, one for all, or None for the full one.
        depth: Number of blocks.
        full: Width before pruning.

    Raises:
        TypeError: Not integers.
        ValueError: Not one per block, or out of range.
    """
    entries: list[Any]
    if widths is None or type(widths) is int:
        entries = [full if widths is None else widths] * depth
    elif isinstance(widths, Sequence) and all(type(width) is int for width in widths):
        entries = list(widths)
    else:
        raise TypeError(f"EVAViT: mlp_hidden must be an int or a list of ints, got {widths!r}")
    if len(entries) != depth or not all(0 <= width <= full for width in entries):
        raise ValueError(
            f"EVAViT: mlp_hidden must be one width of [0, {full}] per block ({depth}), "
            f"got {entries}"
        )
    return entries
