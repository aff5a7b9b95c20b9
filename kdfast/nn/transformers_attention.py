# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: an attention function of its own interface.

See docs/use/accelerate.md.

transformers is imported only by functions that are given one of its models, or asked to register.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.nn.attention import qualified_name, say_once
from kdfast.nn.limits import eager_config
from kdfast.ops.sdpa import self_attention, unfused

NAME = "kdfast"
_PRETRAINED = "transformers.modeling_utils.PreTrainedModel"
# What an accelerated module remembers, to be restored: not in the config, which is saved.
_BEFORE = "_kdfast_before"
_BACKEND = "_kdfast_backend"
_REGISTERS = "_kdfast_registers"
_PLACE = "_kdfast_place"


class _Registers:
    """Travels with an accelerated module: the process that unpickles it knows the name then."""

    def __reduce__(self) -> Any:
        return _unpickled, ()


def _unpickled() -> _Registers:
    register_transformers()
    return _Registers()


def register_transformers() -> None:
    """Makes ``attn_implementation="kdfast"`` known to transformers.

    Vision towers can then be built with it or switched by ``model.set_attn_implementation``. Masks,
    causal calls, dropout and cross-attention run transformers' own "sdpa" function, so text towers
    keep working.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: (B, H, N, D) each to (B, N, H, D).

    Args:
        module: The attention that calls.
        query: (B, H, N, D).
        key: (B, H, N, D), or anything that "sdpa" takes.
        value: Like ``key``.
        attention_mask: In a fused call None, or the position bias (G, H, N, N) of BEiT or Swin.
        dropout: 0 in a fused call.
        scaling: Factor of the logits.
        is_causal: False in a fused call; the module's attribute if None.
        **kwargs: Further arguments of the interface; a call with one that is not None and might
            change the result is left to "sdpa".
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    other = [name for name in _SPECIAL if kwargs.get(name) is not None]
    bias = attention_mask if _is_bias(attention_mask, query) else None
    mask = attention_mask if bias is None else None
    plain = not other and not causal and query.shape[1] == key.shape[1]
    if plain and (kwargs.get("output_attentions") or _recorded()):
        return _with_weights(module, query, key, value, attention_mask, dropout, scaling)
    if other or unfused(query, key, value, mask, dropout, bool(causal)):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        _say(module, _special(mask, dropout, other))
        kwargs.update(dropout=dropout, scaling=scaling, is_causal=is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = self_attention(query, key, value, scale=scaling, bias=bias, backend=backend_of(module))
    return out.transpose(1, 2).contiguous(), None


def _special(mask: Tensor | None, dropout: float, other: list[str]) -> str:
    """What keeps a call from the kernel, in words."""
    if mask is not None:
        return "a mask"
    return (
        f"attention dropout {dropout}"
        if dropout
        else "a call with " + (", ".join(other) or "causal or unequal queries and keys")
    )


def _say(module: nn.Module, what: str) -> None:
    """Says so of a module that ``accelerate`` switched: its report called it fused."""
    place = getattr(module, _PLACE, None)
    if place is not None:
        say_once(qualified_name(module), what, place, backend_of(module))


def _with_weights(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    """The call with its attention weights (B, H, N, M), as "eager" has them."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = nn.functional.dropout(weights.to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _recorded() -> bool:
    """Whether a call of a model of transformers that runs now was asked for attention weights."""
    recorder = sys.modules.get("transformers.utils.output_capturing")
    if recorder is None:
        return False
    collector = recorder._active_collector
    # torch.compile cannot trace a context variable; transformers keeps a global one for it.
    asked = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return asked is not None and any("attentions" in name for name in asked)


def backend_of(module: nn.Module) -> str | None:
    """The backend that ``switch`` gave an attention; None if none."""
    backend: str | None = getattr(module, _BACKEND, None)
    return backend


def is_idle(hook: Any) -> bool:
    """Whether a hook is transformers' recorder of attention weights, which no call asks for now.

    It stays on an attention once a call with ``output_attentions`` or ``output_hidden_states`` put
    it there.
    """
    name = "transformers.utils.output_capturing"
    return getattr(hook, "__module__", None) == name and not _recorded()


def _is_bias(mask: Tensor | None, query: Tensor) -> bool:
    """Whether a mask is one number for every head and pair of tokens, in turn for the images."""
    if mask is None or not mask.is_floating_point() or mask.dim() != 4:
        return False
    batch, heads, tokens = query.shape[:3]
    return mask.shape[1:] == (heads, tokens, tokens) and batch % max(1, mask.shape[0]) == 0


_SPECIAL = ("softcap", "position_bias", "cache", "sliding_window", "s_aux")


def _calls_interface(cls: type[nn.Module]) -> bool:
    """Whether a class has code that asks transformers for an attention function.

    Others are attention by name only, or hold one of another kind, as pooling heads do.
    """
    methods = (x for base in cls.__mro__ if base is not nn.Module for x in vars(base).values())
    codes = (getattr(inspect.unwrap(x), "__code__", None) for x in methods if callable(x))
    return any(code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def attentions(model: nn.Module, replace_eager: bool = False) -> dict[nn.Module, str | None]:
    """Attentions of the transformers models in ``model``, each with why it has to stay, or None.

    transformers is not imported.

    Args:
        model: Any module.
        replace_eager: Whether ``attn_implementation="eager"`` is no reason.
    """
    owner: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if any(f"{b.__module__}.{b.__qualname__}" == _PRETRAINED for b in type(module).__mro__):
            owner.update(dict.fromkeys(module.modules(), module))
    return {
        module: _why_not(module, holder, replace_eager)
        for module, holder in owner.items()
        if "Attention" in type(module).__name__
        and hasattr(getattr(module, "config", None), "_attn_implementation")
        and _calls_interface(type(module))
    }


def _why_not(module: nn.Module, owner: Any, replace_eager: bool) -> str | None:
    config: Any = module.config
    if not hasattr(config, "patch_size"):
        return "not part of a vision tower: its calls are masked or causal"
    if not owner._can_set_attn_implementation():
        return "its model does not use the attention interface of transformers"
    if reason := _why_no_bias(module, config):
        return reason
    if getattr(module, "is_causal", False):
        return "it is causal"
    if getattr(config, "output_attentions", False):
        return "its config asks for attention weights"
    # Models without another implementation are eager without anybody's wish.
    if config._attn_implementation == "eager" and owner._supports_sdpa and not replace_eager:
        return eager_config("eager")
    return None


def _why_no_bias(module: nn.Module, config: Any) -> str | None:
    names = ("use_relative_position_bias", "use_shared_relative_position_bias", "use_rel_pos")
    fields = [f"config.{name}" for name in names if getattr(config, name, False)]
    if hasattr(module, "relative_position_bias"):
        fields.append("a table of its own")
    if not fields:
        return None
    if type(module).__module__ not in _BIASED:
        return f"it adds a bias to the scores ({fields[0]}) in a way that kdfast does not know"
    return None


# Files whose attentions give their bias to the interface, as a mask.
_BIASED = tuple(
    f"transformers.models.{name}" for name in ("beit.modeling_beit", "swin.modeling_swin")
)


def switch(module: Any, backend: str | None, place: str) -> None:
    """Makes the attentions that share ``module``'s config run fused.

    Args:
        module: One of them.
        backend: As in ``accelerate``.
        place: Its name in the model, for messages.
    """
    register_transformers()
    before = module.config._attn_implementation
    if before != NAME:
        module.__dict__[_BEFORE] = before
        module.config._attn_implementation = NAME
    elif _BEFORE not in module.__dict__:
        module.__dict__[_BEFORE] = None
    module.__dict__[_BACKEND] = backend
    module.__dict__[_PLACE] = place
    module.__dict__[_REGISTERS] = _Registers()


def switch_back(model: nn.Module) -> int:
    """Undoes ``switch`` in all of ``model``; the number of attentions that ran fused."""
    modules: list[Any] = [m for m in model.modules() if _BEFORE in m.__dict__]
    for module in modules:
        if before := module.__dict__.pop(_BEFORE):
            module.config._attn_implementation = before
        module.__dict__.pop(_BACKEND, None)
        module.__dict__.pop(_PLACE, None)
        module.__dict__.pop(_REGISTERS, None)
    return len(modules)
