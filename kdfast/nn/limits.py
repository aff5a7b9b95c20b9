# SPDX-License-Identifier: Apache-2.0
"""What a report says besides "fused": which calls of an attention are not, and who wants it so."""

import inspect
import sys
from typing import Any

from torch import nn

from kdfast.nn.attention import FusedAttention, qualified_name

# Arguments by which models take padding, of which their attentions get a mask.
_PADDING = {
    *("patch_valid", "pixel_attention_mask", "patch_attention_mask", "pixel_mask"),
    *("key_padding_mask", "src_key_padding_mask"),
}
_TORCH_LAYER = "torch.nn.modules.transformer.TransformerEncoderLayer"
_WISH = "accelerate(model, replace_eager=True) replaces it all the same"


def eager_reason(fused: FusedAttention) -> str | None:
    """Why an attention is left to its own code, as it is now, or None."""
    reason = fused.eager()
    if reason == "fused_attn=False":
        return f"it was told to compute attention weights (fused_attn=False); {_WISH}"
    return reason and f"{reason}, which the kernel would go around"


def switched_off(module: nn.Module) -> str | None:
    """The reason for a module that timm built eager while ``set_fused_attn(False)`` holds.

    Some of timm's classes are eager unless that switch is set higher than its default; when it is
    off, that is a wish for them too.
    """
    config = sys.modules.get("timm.layers.config")
    off = config is not None and not config.use_fused_attn()
    if off and module.__dict__.get("fused_attn") is False:
        return f"timm's fused attention is switched off; {_WISH}"
    return None


def eager_config(implementation: str) -> str:
    """The reason for an attention of transformers."""
    return f'attn_implementation="{implementation}" was asked for; {_WISH}'


class Limits:
    """Which calls of the attentions of a model run other code than the report names."""

    def __init__(self, model: nn.Module) -> None:
        self._padded: set[nn.Module] = set()
        self._own_path: set[nn.Module] = set()
        for module in model.modules():
            if not _PADDING.isdisjoint(inspect.signature(type(module).forward).parameters):
                self._padded.update(module.modules())
            if qualified_name(module) == _TORCH_LAYER:
                self._own_path.update(module.children())

    def of(self, module: Any, now: str, fused: FusedAttention | None = None) -> str:
        """What an attention is now, with those limits."""
        dropout = _config_dropout(module) if fused is None else fused.dropout_p()
        limits = []
        if dropout:
            limits.append(f"in eval (attention dropout {dropout})")
        if module in self._padded:
            limits.append("without a padding mask")
        if module in self._own_path:
            limits.append("where its TransformerEncoderLayer has no faster path of its own")
        return ", ".join([now, *limits])


def _config_dropout(module: Any) -> float:
    fields = ("attention_probs_dropout_prob", "attention_dropout")
    found = [getattr(module.config, field, None) for field in fields]
    return max([0.0, *(float(p) for p in found if isinstance(p, int | float))])
