# SPDX-License-Identifier: Apache-2.0
"""The same model pruned by Torch-Pruning, to the same number of multiply-adds.

Half of the heads and half of the hidden units of every block are removed, as by ours at its
smallest choice; the residual stream and the decoder keep their widths.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor
from tqdm.auto import tqdm

from examples.saliency.model import SIDE, Saliency

METHODS = ("magnitude", "taylor")


def pruned(model: Saliency, method: str, keep: float, data: Sequence[Tensor]) -> Saliency:
    """A copy pruned by Torch-Pruning.

    Args:
        model: The whole model.
        method: "magnitude", or "taylor": gradients on pictures, of the cross-entropy to the
            model's own map above one half, as there are no labels.
        keep: Part of the heads and of the hidden units of every block that stays.
        data: Batches (B, 3, H, W) for the gradients.

    Raises:
        ImportError: torch_pruning is missing.
    """
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise ImportError(
            "the rows of Torch-Pruning need torch-pruning; pip install 'kdfast[examples]'"
        ) from error
    student = copy.deepcopy(model).eval()
    attentions = [m for m in student.backbone.modules() if isinstance(m, Attention)]
    prunable = {m.qkv for m in attentions} | {b.mlp.fc1 for b in student.backbone.blocks}
    others = [
        m
        for m in student.backbone.modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) and m not in prunable
    ]
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "taylor": tp.importance.GroupTaylorImportance,
    }[method]()
    pruner = tp.pruner.BasePruner(
        student.backbone,
        torch.zeros(1, 3, SIDE, SIDE),
        importance,
        pruning_ratio=1 - keep,
        head_pruning_ratio=1 - keep,
        num_heads={m.qkv: m.num_heads for m in attentions},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=others,
        # Its default is one dictionary for all pruners of a process.
        out_channel_groups={},
        unwrapped_parameters=_last_axes(student.backbone),
        forward_fn=lambda backbone, x: backbone.forward_features(x),
    )
    if method == "taylor":
        _gradients(student, data)
    pruner.step()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = attention.num_heads * attention.head_dim
    student.zero_grad(set_to_none=True)
    return student


def _last_axes(backbone: Any) -> list[tuple[torch.nn.Parameter, int]]:
    """Where the parameters outside of layers have the channels of the residual stream."""
    scales = [scale.gamma for b in backbone.blocks for scale in (b.ls1, b.ls2)]
    return [(x, x.dim() - 1) for x in (backbone.cls_token, backbone.pos_embed, *scales)]


def _gradients(model: Saliency, data: Sequence[Tensor]) -> None:
    """Adds up the gradients of the loss over the batches."""
    for batch in tqdm(data, desc="gradients", disable=None):
        logits = model(batch)
        goal: Any = (logits.detach() > 0).float()
        F.binary_cross_entropy_with_logits(logits, goal).backward()


def kept_heads(pruned_model: Saliency, model: Saliency) -> list[list[int]]:
    """Of every block: the heads of the original that an untrained pruned model holds."""
    found = []
    for mine, whole in zip(pruned_model.backbone.blocks, model.backbone.blocks, strict=True):
        keys, every = _queries(mine.attn), _queries(whole.attn)
        found.append([i for x in keys for i, y in enumerate(every) if torch.equal(x, y)])
        if len(found[-1]) != len(keys):
            raise ValueError(f"kept_heads: every head must be one of the original, got {found[-1]}")
    return found


def _queries(attention: Any) -> list[Tensor]:
    """The rows of the query projection that belong to every head."""
    queries = attention.qkv.weight.detach().chunk(3)[0]
    return list(queries.chunk(math.ceil(len(queries) / attention.head_dim)))
