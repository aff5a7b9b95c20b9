# SPDX-License-Identifier: Apache-2.0
"""Attention maps of a whole model by one call. See docs/use/attention_pictures.md.

B batch, H heads, N tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.nn.attention import qualified_name
from kdfast.nn.table import FUSED, unfused_reason
from kdfast.nn.transformers_attention import attentions
from kdfast.pictures.capture import Watcher, eval_and_fused
from kdfast.pruning.inputs import model_inputs, outputs
from kdfast.pruning.observe import moved


def attention_maps(
    model: nn.Module, batch: Any, *, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Probabilities of every self-attention in one forward pass, in eval mode.

    Accelerated models, pruned ones and those that kdfast has not seen before: the forward runs as
    it is, whatever calls torch's or kdfast's attention is seen, and the model is left as it was.

    Args:
        model: A model of timm, torchvision or Hugging Face, ``EVAViT``, or one of your own that
            calls ``torch.nn.functional.scaled_dot_product_attention``; not compiled.
        batch: Images (B, 3, H, W), or a dict with the model's arguments by name.
        layers: Names of the attentions to make maps of, which are the keys of a call without it.
            Maps of a large model are large: H N^2 numbers a layer and image.

    Returns:
        (B, H, N, N) by the name of the attention, in the order of execution; rows sum to 1. With
        attention in windows B counts the windows of all images, and N their tokens. fp32 (fp64 for
        fp64 models). A module that attends several times has the number of the call after its name.

    Raises:
        TypeError: The batch is of another kind.
        ValueError: There is no such layer, or the batch is empty.
        NotImplementedError: No attention can be seen, with the reason; or one is causal.
    """
    like = next(model.parameters(), torch.empty(0))
    given = model_inputs("attention_maps", model, moved(batch, like.device))
    watcher = Watcher(model, "attention_maps")
    with torch.no_grad(), eval_and_fused(model), watcher.attached():
        outputs(model, given)
    if not watcher.layers:
        raise NotImplementedError(f"attention_maps: {_why_none(model)}")
    found = {}
    for layer in watcher.layers:
        name, calls = layer.name, 1
        while name in found:
            calls += 1
            name = f"{layer.name} call {calls}"
        found[name] = layer
    if unknown := sorted(set(layers or ()) - set(found)):
        raise ValueError(f"attention_maps: layers must be of {list(found)}, got {unknown}")
    return {name: found[name].map() for name in (found if layers is None else layers)}


def _why_none(model: nn.Module) -> str:
    """Why a model that ran showed no attention."""
    by_interface = attentions(model)
    reasons = set()
    for module in model.modules():
        name = qualified_name(module)
        reason = by_interface.get(module) or unfused_reason(module)
        if name in FUSED:
            reason = "call kdfast.accelerate(model) first, which makes it visible"
        if reason:
            reasons.add(f"{name}: {reason}")
    because = f"; {'; '.join(sorted(reasons))}" if reasons else ""
    return (
        f"{type(model).__name__} called neither torch's scaled_dot_product_attention nor kdfast's, "
        f"which are what can be seen (and not in a compiled model){because}"
    )
