# SPDX-License-Identifier: Apache-2.0
"""Attention inputs and features of a model's forward, read by hooks while it runs as it is.

B batch, H heads, N tokens, D head dim, C channels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdfast.matching.features import FeatureRow, feature_rows, tokens_of
from kdfast.matching.hf_reader import HfReader, hf_reader
from kdfast.nn.attention import FusedAttention, qualified_name
from kdfast.nn.heads import AttentionCall
from kdfast.nn.pool import TimmClassAttention
from kdfast.nn.table import FUSED, UNKNOWN, unfused_reason
from kdfast.ops._torch_private import storage_key

# Submodules that run after the softmax, so that no queries and keys come out of them.
_AFTER = (
    *("attn_drop", "proj", "out_proj", "o_proj", "attn_out_proj", "mlp", "drop_path", "ls"),
    "sub_norm",
)
# What tells queries and keys of an attention's calls, and which original heads they are of.
Reader = FusedAttention | HfReader


def reader_of(module: nn.Module) -> Reader | str | None:
    """What tells queries and keys of an attention's calls: its fused stand-in, which never runs.

    Returns:
        The stand-in, on the module's own tensors, or what stands for it with transformers; the
        reason why its maps cannot be read; or None for a module that is no attention.
    """
    found = hf_reader(module)
    if found is not None:
        return found
    few = "a pool of few queries has no map from tokens to tokens"
    if isinstance(module, FusedAttention):
        if isinstance(module, TimmClassAttention):
            return few
        return module if module.num_heads else "it has lost all its heads"
    kind = FUSED.get(qualified_name(module))
    if kind is None:
        return unfused_reason(module)
    if "forward" in module.__dict__:
        return "its instance has a forward of its own"
    if issubclass(kind, TimmClassAttention):
        return few
    # A copy, as the stand-in says to the original what is set on it.
    twin = copy.copy(module)
    return kind.why_not(twin) or kind.adopt(twin)


def readers(net: nn.Module) -> dict[str, Reader | str]:
    """``reader_of`` of every attention of a model, by name."""
    found: dict[str, Reader | str] = {}
    inside: set[nn.Module] = set()
    for name, module in net.named_modules():
        if module not in inside and (reader := reader_of(module)) is not None:
            found[name] = reader
            if not isinstance(reader, str):
                inside.update(module.modules())
    # Blocks that are only named after the attention that they hold are none.
    return {
        name: reader
        for name, reader in found.items()
        if reader != UNKNOWN or not any(other.startswith(f"{name}.") for other in found)
    }


def attention_layers(net: nn.Module, name: str) -> list[str]:
    """Names of the self-attentions whose maps can be read, in the order of the model.

    Attentions of another kind, such as pools or those over channels, are left out.

    Args:
        net: A model of timm, torchvision or Hugging Face, accelerated or not.
        name: Its name, for the message.

    Raises:
        ValueError: There is none; the message says why, by class.
    """
    every = readers(net)
    found = [path for path, reader in every.items() if not isinstance(reader, str)]
    if not found:
        raise ValueError(
            f"distill.attention: {name} must have self-attention whose maps can be read, "
            f"{reasons(net, every)}"
        )
    return found


def reasons(net: nn.Module, every: Mapping[str, Reader | str]) -> str:
    """Why attentions of a model are not read, one reason by class."""
    found = {
        f"{qualified_name(net.get_submodule(path))}: {reader}"
        for path, reader in every.items()
        if isinstance(reader, str)
    }
    return f"but {'; '.join(sorted(found))}" if found else "it has no attention"


class Capture:
    """Context in which a forward of ``net`` leaves what the named modules saw.

    The model runs unchanged, also under activation checkpointing: the hooks keep tensors and
    compute nothing. Queries and keys are made afterwards, from the projections' kept outputs.

    Attributes:
        features: Outputs by name, as (B, N, C).
    """

    def __init__(
        self,
        net: nn.Module,
        attention: list[str],
        features: list[str],
        *,
        strict: bool = True,
        rows: Mapping[str, FeatureRow] | None = None,
    ) -> None:
        """Name the modules to watch.

        Args:
            net: The model.
            attention: Names of attentions that have a reader.
            features: Names of ``rows``.
            strict: Whether a forward must pass all of them.
            rows: The layers of ``features``; those that timm lists if None.
        """
        self.net, self.attention, self.names, self.strict = net, attention, features, strict
        self.features: dict[str, Tensor] = {}
        self._modules = {name: net.get_submodule(name) for name in (*attention, *features)}
        self._rows = feature_rows(net) if rows is None else rows
        self._inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._calls: dict[str, AttentionCall] = {}
        self._handles: list[RemovableHandle] = []
        self._reading = False

    def __enter__(self) -> Capture:
        for name in self.attention:
            module = self._modules[name]
            hook = partial(self._keep_inputs, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._handles.append(module.register_forward_hook(partial(self._left, name)))
            for leaf in _leaves(module):
                self._handles.append(leaf.register_forward_hook(self._keep))
        for name in self.names:
            hook = partial(self._keep_feature, name)
            self._handles.append(self._modules[name].register_forward_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        seen = len(self.called) + len(self.features)
        if kind is None and self.strict and seen != len(self.attention) + len(self.names):
            raise RuntimeError(
                f"distill: a forward must pass {[*self.attention, *self.names]}, "
                f"got {[*self.called, *self.features]}"
            )

    @property
    def qk(self) -> dict[str, AttentionCall]:
        """The inputs of every named attention that was called, by name: those that it used."""
        return {name: self.call(name) for name in self.called}

    @property
    def called(self) -> list[str]:
        """The named attentions that a forward has passed."""
        return [name for name in self.attention if name in self._inputs or name in self._calls]

    def call(self, name: str) -> AttentionCall:
        """The inputs of one attention in its last call.

        Raises:
            ValueError: They cannot be read; the message is the reason.
        """
        if name not in self._calls:
            module = self._modules[name]
            self._reading = True
            try:
                with self._replayed(module):
                    self._calls[name] = attention_call(module, *self._inputs[name])
            finally:
                self._reading = False
            del self._inputs[name]
            for leaf in _leaves(module):
                self._kept.pop(leaf, None)
        return self._calls[name]

    def _keep_inputs(
        self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._reading:
            self._inputs[name] = (args, kwargs)
            self._calls.pop(name, None)

    def _left(self, name: str, *_: Any) -> None:
        # Nothing is recomputed without a graph: what the reading does not need is freed at once.
        if not torch.is_grad_enabled():
            with suppress(ValueError):  # raised again for who asks
                self.call(name)

    def _keep(self, leaf: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not self._reading and len(args) == 1 and isinstance(out, Tensor):
            self._kept[leaf] = (args[0], out)

    def _keep_feature(self, name: str, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.features[name] = tokens_of(self.net, self._rows[name], out)

    @contextmanager
    def _replayed(self, module: nn.Module) -> Iterator[None]:
        """Inside, a layer that gets the input of the forward again returns what it returned then.

        So nothing is projected twice, and random layers, such as a dropout in the network of a
        position bias, give the numbers that the model used.
        """
        own = 1 if self._handles else 0
        with ExitStack() as undo:
            for leaf in _leaves(module):
                mine = leaf in self._kept and "forward" not in leaf.__dict__
                # Other hooks may have changed what was kept; they would do it again.
                if mine and not leaf._forward_pre_hooks and len(leaf._forward_hooks) <= own:
                    again = partial(_again, leaf.forward, *self._kept[leaf])
                    leaf.__dict__["forward"] = again
                    undo.callback(leaf.__dict__.pop, "forward")
            yield


def attention_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AttentionCall:
    """Queries, keys, rotation, bias and scale of a call of an attention with these arguments.

    Raises:
        ValueError: The map of the call cannot be read; the message is the reason.
    """
    reader = reader_of(module)
    if reader is None or isinstance(reader, str):
        raise ValueError(reader or "it is no attention")
    bound = inspect.signature(reader.forward).bind(*args, **kwargs).arguments
    masks = ("attn_mask", "key_padding_mask", "attention_mask")
    if any(bound.get(name) is not None for name in masks):
        raise ValueError("its calls have a mask")
    if bound.get("is_causal"):
        raise ValueError("its calls are causal")
    if bound.get("key", bound.get("query")) is not bound.get("query"):
        raise ValueError("its keys come from other tokens than its queries")
    call = reader.read(args, kwargs)
    if call.q.shape != call.k.shape:
        raise ValueError("its queries are not one per key")
    return call


def late_readers(net: nn.Module, attention: list[str]) -> list[nn.Module]:
    """The attentions whose queries, keys and biases need parameters once more after their forward.

    Of the others it is enough to have kept what their layers returned.

    Args:
        net: The model.
        attention: Names of attentions that have a reader.
    """
    found = []
    for name in attention:
        module = net.get_submodule(name)
        kept = {id(p) for leaf in _leaves(module) for p in leaf.parameters()}
        after = {id(p) for n, p in module.named_parameters() if n.startswith(_AFTER)}
        if any(id(p) not in kept | after for p in module.parameters()):
            found.append(module)
    return found


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Layers of an attention that queries, keys and biases may come from."""
    for name, layer in module.named_modules():
        # A module of its own that the stand-in goes around would keep it from running fused.
        around = name in ("softmax", "rel_pos") or name.startswith(_AFTER)
        if name and not around and not layer._modules:
            yield layer


def _again(forward: Any, given: Any, out: Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not args and not kwargs and _same(x, given):
        return out
    return forward(x, *args, **kwargs)


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors are one view of one memory."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    views = [(storage_key(x), x.storage_offset(), x.shape, x.stride(), x.dtype) for x in (a, b)]
    return views[0] == views[1]
