# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of ORION's backbone in a checkpoint, and what they tell about the model."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kdfast.models.axial_rope import axial_tables

PREFIX = "img_backbone."
TABLES = ("freqs_cos", "freqs_sin")
TABLE_KEY = re.compile(r"(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.(freqs_cos|freqs_sin)")
HEAD_DIM = 64
Shapes = Mapping[str, tuple[int, ...]]


def backbone_names(keys: Iterable[str]) -> dict[str, str]:
    """Backbone names of checkpoint keys, mapped to the keys.

    A leading ``module.`` is dropped. If any key belongs to ``img_backbone.``, the keys of all
    other modules are left out; otherwise every key is taken for the backbone's.

    Raises:
        ValueError: Two keys have one name.
    """
    keys = list(keys)
    plain = {key: key.removeprefix("module.") for key in keys}
    whole = any(name.startswith(PREFIX) for name in plain.values())
    names: dict[str, str] = {}
    for key, name in plain.items():
        if whole and not name.startswith(PREFIX):
            continue
        name = name.removeprefix(PREFIX)
        if name in names:
            raise ValueError(f"checkpoint: keys must be distinct, got {names[name]} and {key}")
        names[name] = key
    return names


def is_table(name: str) -> bool:
    """Whether the backbone name is one of ORION's rotary buffers."""
    return TABLE_KEY.fullmatch(name) is not None


def orion_tables(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The rotary buffers that ORION's model of this config saves, each its own (n * n, D) fp32."""
    head_dim = config["embed_dim"] // config["num_heads"]
    span = config["pt_hw_seq_len"]

    def tables(side: int) -> Tensor:
        side = side if config["intp_freq"] else span
        return axial_tables((side, side), head_dim, span, config["intp_freq"])

    window, image = (
        tables(config["window_size"]),
        tables(config["img_size"] // config["patch_size"]),
    )
    owners = {"rope_win": window, "rope_glb": image}
    for i in range(config["depth"]):
        inside = i in config["window_block_indexes"]
        owners[f"blocks.{i}.attn.rope"] = window if inside else image
    return {
        f"{owner}.{name}": table.clone()
        for owner, pair in owners.items()
        for name, table in zip(TABLES, pair, strict=True)
    }


def table_problems(found: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a checkpoint's rotary buffers; a checkpoint may also have none."""
    if not found:
        return []
    wanted = orion_tables(config)
    problems = shape_problems(_shapes(found), _shapes(wanted))
    for name in sorted(wanted.keys() & found.keys()):
        have, want = found[name], wanted[name]
        if have.shape != want.shape:
            continue
        # fp32 angles up to 16 carry about 1e-6; a half-precision checkpoint its own rounding.
        bound = max(1e-5, torch.finfo(have.dtype).eps) if have.is_floating_point() else 1e-5
        error = (have.double() - want.double()).abs().max().item() if want.numel() else 0.0
        if not error <= bound:
            problems.append(f"wrong rotary table {name}: differs by {error:.3g}")
    return problems


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def shape_problems(found: Shapes, wanted: Shapes) -> list[str]:
    """Every missing, extra and mis-shaped name, one line each."""
    missing = [f"missing {name} {wanted[name]}" for name in wanted if name not in found]
    extra = [f"extra {name} {found[name]}" for name in found if name not in wanted]
    wrong = [
        f"mis-shaped {name}: must be {shape}, got {found[name]}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return missing + extra + wrong


def infer_config(found: Shapes, head_dim: int | None) -> dict[str, Any]:
    """Constructor arguments that the shapes of a checkpoint show.

    What cannot be read off because its key is missing is left out, so that the comparison with
    the model names the key.

    Args:
        found: Shapes by backbone name, rotary buffers included.
        head_dim: D; read off the rotary buffers if None, 64 without them.
    """
    config: dict[str, Any] = {"depth": 1 + max(_blocks(found), default=23)}
    patch = found.get("patch_embed.proj.weight", ())
    if len(patch) == 4:
        config["embed_dim"], config["in_chans"], config["patch_size"] = patch[:3]
    else:
        config["embed_dim"] = _common(found, r"blocks\.\d+\.norm[12]\.(weight|bias)", 0, 1024)
        config["patch_size"] = 16
    dim = config["embed_dim"]
    if head_dim is None:
        head_dim = _common(found, TABLE_KEY.pattern, 1, HEAD_DIM)
    config["num_heads"] = max(dim // head_dim, 1)
    ratio = 4 * 2 / 3
    hidden = _common(
        found, r"blocks\.\d+\.mlp\.(w[12]\.(weight|bias)|ffn_ln\.\w+)", 0, int(dim * ratio)
    )
    # Half a unit more, so that int(dim * ratio) cannot fall to the integer below.
    config["mlp_ratio"] = ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim
    rows = found.get("pos_embed", (1, 197, dim))[1:2]
    if rows and rows[0] > 0:
        side = math.isqrt(rows[0])
        config["pretrain_use_cls_token"] = side * side != rows[0]
        config["pretrain_img_size"] = max(side, 1) * config["patch_size"]
    return config | _infer_windows(found, config["depth"], config["patch_size"])


def _infer_windows(found: Shapes, depth: int, patch_size: int) -> dict[str, Any]:
    """Windows from the row counts of the rotary buffers; empty where there are none."""
    if not any(is_table(name) for name in found):
        return {}
    window = found.get("rope_win.freqs_cos", found.get("rope_win.freqs_sin", (256,)))[0]
    image = found.get("rope_glb.freqs_cos", found.get("rope_glb.freqs_sin", (1600,)))[0]
    rows = [found.get(f"blocks.{i}.attn.rope.freqs_cos", (0,))[0] for i in range(depth)]
    return {
        "window_size": math.isqrt(window),
        "img_size": math.isqrt(image) * patch_size,
        "window_block_indexes": [i for i in range(depth) if rows[i] == window],
    }


def _blocks(found: Collection[str]) -> set[int]:
    matches = (re.match(r"blocks\.(\d+)\.", name) for name in found)
    return {int(match[1]) for match in matches if match}


def _common(found: Shapes, pattern: str, dim: int, default: int) -> int:
    """Size that most tensors of a kind have along ``dim``, or ``default`` without any."""
    votes: dict[int, int] = defaultdict(int)
    for name, shape in found.items():
        if len(shape) > dim and re.fullmatch(pattern, name):
            votes[shape[dim]] += 1
    return max(votes, key=votes.__getitem__) if votes else default
