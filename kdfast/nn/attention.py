# SPDX-License-Identifier: Apache-2.0
"""The base of every fused attention module. See docs/use/accelerate.md.

B batch, H heads, N tokens, D head dim, C channels.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.nn.heads import AttentionCall, HeadAxis, find_tensor, resize
from kdfast.ops._checks import head_list
from kdfast.ops._library import FallbackWarning
from kdfast.ops.pruned_attention import rotated
from kdfast.ops.sdpa import repeated, self_attention

if TYPE_CHECKING:
    from typing_extensions import Self

_warned: set[tuple[str, str]] = set()


def qualified_name(module: nn.Module) -> str:
    """Where the module's class is defined: ``package.module.Class``.

    Of a module whose class ``accelerate`` changed it is the class that it had.
    """
    cls = getattr(type(module), "kdfast_source", type(module))
    return f"{cls.__module__}.{cls.__qualname__}"


def own_call(module: nn.Module) -> str | None:
    """Why a module must not be replaced whatever its class: its instance says how it is called."""
    if "forward" in module.__dict__:
        return "its instance has a forward of its own"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return "it is compiled already; accelerate first, then compile"
    return None


class FusedAttention(nn.Module):
    """Stands in for an attention module of some library, on that module's own tensors.

    An instance is made by ``adopt``, never by its class: it takes over the original's tables of
    parameters, buffers, submodules and hooks. So the state dict keeps its keys, whatever is done to
    a tensor through one of the two (``to``, ``load_state_dict``) is done to the other, and the
    original can be put back at any time.

    A subclass defines ``axes``, ``why_not``, ``project``, and a ``forward`` that calls ``attend``.

    Attributes:
        axes: Names, as in the state dict, of the tensors that hold heads, and where in each the
            heads lie. Names that an instance lacks are skipped. Empty: heads cannot be removed.
        num_heads: H, the heads that the instance holds; 0 leaves the output projection's bias.
        head_dim: D; does not change when heads are removed. H * D need not be C.
        heads: Original index of each of the H heads, ascending.
        kv_group: Number of consecutive query heads that share a key/value head.
        scale: Factor of the logits.
        source: Qualified class name of the original.
        backend: As in ``kdfast.pruned_attention``, or None.
        cosine: Whether queries and keys are scaled to length 1; the size of their weights then says
            nothing about a head.
        unprunable: Why ``kdfast.prune_heads`` leaves such attentions whole; None where it does not.
    """

    axes: ClassVar[Mapping[str, HeadAxis]] = {}
    cosine: ClassVar[bool] = False
    unprunable: ClassVar[str | None] = None

    num_heads: int
    head_dim: int
    heads: list[int]
    kv_group: int
    scale: float
    source: str
    backend: str | None
    # In a tuple, so that the original is not registered as a submodule; empty after pruning.
    _original: tuple[nn.Module, ...]

    if TYPE_CHECKING:
        # The submodules and attributes of the original, whatever it has.
        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def why_not(cls, original: nn.Module) -> str | None:
        """The reason why this class cannot stand in for ``original``, or None."""
        raise NotImplementedError(f"{cls.__name__} must say what it cannot replace")

    @classmethod
    def adopt(cls, original: nn.Module, backend: str | None = None) -> "Self":
        """A module that computes what ``original`` does, on the same tensors.

        Args:
            original: A module of the class that this one stands in for.
            backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.

        Raises:
            NotImplementedError: ``why_not`` has a reason.
        """
        if reason := cls.why_not(original):
            raise NotImplementedError(f"{qualified_name(original)}: {reason}")
        self = cls.__new__(cls)
        # The tables themselves, not copies: neither module can then miss a change to a tensor.
        self.__dict__.update(original.__dict__)
        self._original = (original,)
        self.source = qualified_name(original)
        self.backend = backend
        self.kv_group = 1
        self._configure()
        self.heads = list(range(self.num_heads))
        return self

    def _configure(self) -> None:
        """Sets ``num_heads``, ``head_dim``, ``kv_group`` and ``scale`` where names differ."""

    def original(self) -> nn.Module | None:
        """The module that this one stands in for; None once heads were removed."""
        if not self._original:
            return None
        (original,) = self._original
        original.training = self.training
        return original

    def projection(self) -> nn.Module:
        """The module whose input (B, N, H * D) is the heads' outputs side by side."""
        return cast(nn.Module, self.proj)

    def slice_dim(self) -> int:
        """Channels of one head in the input of ``projection``."""
        return self.head_dim

    def sequences(self, x: Tensor) -> tuple[int, int]:
        """How many sequences attend apart in a call with ``x``, and the tokens of each."""
        return x.shape[0], x.shape[1]

    def pads(self, x: Tensor) -> Tensor | None:
        """Which rows of the projection's input in a call with ``x`` are pads; None: none can be."""
        return None

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> AttentionCall:
        """Queries, keys and values of a call with these arguments of ``forward``; H is not 0."""
        raise NotImplementedError(f"{type(self).__name__} must say how it projects")

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AttentionCall:
        """``project`` of a call with these arguments of ``forward``; masks that it has no part in
        are left out."""
        (_, x), *others = inspect.signature(self.forward).bind(*args, **kwargs).arguments.items()
        known = inspect.signature(self.project).parameters
        return self.project(x, **{name: value for name, value in others if name in known})

    def attend(
        self, call: AttentionCall, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The heads' outputs, (B, N, H * D).

        The fused kernel computes them. With a mask, in causal calls and while attention weights are
        dropped, torch's function does, as in the original, and a FallbackWarning says so once.

        Args:
            call: Result of ``project``.
            attn_mask: Boolean or additive mask that broadcasts to (B, H, N, N); not with a bias.
            is_causal: Whether a token sees only itself and the tokens before it.
        """
        q, k, v = call.q, call.k, cast(Tensor, call.v)
        dropout_p = self.dropout_p() if self.training else 0.0
        what = None
        if dropout_p:
            what = f"attention dropout {dropout_p}"
        elif attn_mask is not None or is_causal:
            what = "a causal call" if attn_mask is None else "a mask"
        elif q.shape != k.shape:
            what = "queries that are not one per key"
        if what is None:
            out = self_attention(
                q, k, v, rope=call.rope, scale=call.scale, bias=call.bias, backend=self.backend
            )
        else:
            self._say_once(what)
            q, k = rotated(q, call.rope, None), rotated(k, call.rope, None)
            if call.bias is not None:
                attn_mask = repeated(call.bias, q)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=call.scale
            )
        return out.transpose(1, 2).flatten(2)

    def dropout_p(self) -> float:
        """Probability to drop an attention weight in training, as the original has it now."""
        drop = self._modules.get("attn_drop")
        return drop.p if isinstance(drop, nn.Dropout) else 0.0

    def _say_once(self, what: str) -> None:
        if self.backend == "fused":
            raise NotImplementedError(f"{self.source}: backend='fused' cannot run {what}")
        # A Python warning would break torch.compile(fullgraph=True).
        if torch.compiler.is_compiling() or (self.source, what) in _warned:
            return
        _warned.add((self.source, what))
        warnings.warn(
            f"{self.source}: the fused kernel cannot run {what}; such calls run torch's attention",
            FallbackWarning,
            stacklevel=3,
        )

    @torch.no_grad()
    def keep_heads(self, heads: Sequence[int]) -> None:
        """Removes all other heads, in place: every tensor of ``axes`` is cut and copied.

        The original cannot be put back afterwards. The submodules are shared with it: deep-copy a
        model first that is still needed whole. ``requires_grad`` stays; gradients are dropped.

        Args:
            heads: Original indices, a subset of ``self.heads`` (perhaps none); whole groups where
                query heads share a key/value head. Order has no meaning.

        Raises:
            TypeError: Not integers.
            ValueError: A head is not held or repeated, or a group is not kept or dropped as one.
            NotImplementedError: Heads cannot be removed from this kind of module.
        """
        name = f"{type(self).__name__}.keep_heads"
        if not self.axes:
            raise NotImplementedError(f"{name}: the heads of {self.source} cannot be removed")
        kept = (
            head_list(name, "heads", heads, max(self.heads, default=-1) + 1) if len(heads) else []
        )
        if missing := sorted(set(kept) - set(self.heads)):
            raise ValueError(f"{name}: heads must be held, {missing} are not in {self.heads}")
        positions = [i for i, head in enumerate(self.heads) if head in set(kept)]
        groups = sorted({i // self.kv_group for i in positions})
        if len(groups) * self.kv_group != len(positions):
            raise ValueError(
                f"{name}: heads must be whole groups of {self.kv_group} that share a key/value "
                f"head, got {sorted(kept)}"
            )
        for tensor_name, axis in self.axes.items() if self.num_heads else ():
            if axis.grouped:
                self._cut(tensor_name, axis, self.num_heads // self.kv_group, groups)
            else:
                self._cut(tensor_name, axis, self.num_heads, positions)
        self.heads = sorted(kept)
        self.num_heads = len(kept)
        self._original = ()
        self._recount()

    def _cut(self, name: str, axis: HeadAxis, blocks: int, positions: Sequence[int]) -> None:
        """Keeps the blocks at ``positions``, if there is such a tensor."""
        slot = find_tensor(self, name)
        if slot is None:
            return
        old = slot.tensor.detach()
        index = torch.tensor(positions, dtype=torch.long, device=old.device)
        size = old.shape[axis.dim] // (axis.parts * blocks)
        tall = old.unflatten(axis.dim, (axis.parts, blocks, size))
        resize(slot, tall.index_select(axis.dim + 1, index).flatten(axis.dim, axis.dim + 2))

    def _recount(self) -> None:
        """Brings attributes of the original that follow from the number of heads up to date."""
        width = self.num_heads * self.head_dim
        for attribute, value in (("attn_dim", width), ("all_head_dim", width)):
            if attribute in self.__dict__:
                setattr(self, attribute, value)

    def extra_repr(self) -> str:
        """The source, and what the heads are."""
        return f"{self.source}, num_heads={self.num_heads}, head_dim={self.head_dim}"
