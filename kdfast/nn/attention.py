# SPDX-License-Identifier: Apache-2.0
"""The base of every fused attention module. See docs/use/accelerate.md.

B batch, H heads, N tokens, D head dim, C channels.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.nn.heads import AttentionCall, HeadAxis, find_tensor, resize
from kdfast.ops._checks import head_list
from kdfast.ops._library import FallbackWarning
from kdfast.ops._packed import hooked, hooked_everywhere, only_follows
from kdfast.ops._torch_private import is_compiled
from kdfast.ops.pruned_attention import rotated
from kdfast.ops.sdpa import repeated, self_attention

if TYPE_CHECKING:
    from typing_extensions import Self

_warned: set[tuple[str, str]] = set()


def qualified_name(module: nn.Module) -> str:
    """Where the module's class is defined: ``package.module.Class``.

    Of a module whose class ``accelerate`` changed it is the class that it had.
    """
    cls: Any = type(module)
    return _class_name(cls)


@functools.cache
def _class_name(cls: Any) -> str:
    source = getattr(cls, "kdfast_source", cls)
    return f"{source.__module__}.{source.__qualname__}"


def own_call(module: nn.Module) -> str | None:
    """Why a module must not be replaced whatever its class: somebody said how it is called."""
    if "forward" in module.__dict__:
        return "its instance has a forward of its own"
    if is_compiled(module):
        return "it is compiled already; accelerate first, then compile"
    cls = next(base for base in type(module).__mro__ if "forward" in base.__dict__)
    given = cls.__dict__["forward"]
    if getattr(given, "__module__", cls.__module__) != cls.__module__:
        return f"its class has a forward that was put there by {given.__module__}"
    return None


def say_once(source: str, what: str, place: str, backend: str | None) -> None:
    """Warns, once for a class and a cause, that calls of an accelerated attention run other code.

    Args:
        source: The attention's qualified class.
        what: What the kernel cannot run.
        place: Name of the attention in its model, or "".
        backend: Of the attention.

    Raises:
        NotImplementedError: ``backend`` is "fused", which allows no other code.
    """
    if backend == "fused":
        raise NotImplementedError(f"{source}: backend='fused' cannot run {what}")
    # A Python warning would break torch.compile(fullgraph=True).
    if torch.compiler.is_compiling() or (source, what) in _warned:
        return
    _warned.add((source, what))
    where = f" (first in {place})" if place else ""
    warnings.warn(
        f"{source}: the fused kernel cannot run {what}{where}; such calls run torch's attention",
        FallbackWarning,
        stacklevel=4,
    )


# Modules that a kernel may go around, as long as nothing watches them: they hand on what they get,
# or do what the kernel does.
_KNOWN_AROUND = (nn.Dropout, nn.Identity, nn.Softmax)
# Profilers and counters come and go with them, so nothing is said.
EVERYWHERE = "a hook on every module of the process"


def why_not_around(name: str, module: nn.Module) -> str | None:
    """Why a submodule must be called, and not gone around, or None."""
    if "forward" in module.__dict__:
        return f"a forward of its own in {name}"
    if hooked(module, only_follows):
        return EVERYWHERE if hooked_everywhere() else f"a hook on {name}"
    if type(module) not in _KNOWN_AROUND and not type(module).__module__.startswith("timm."):
        return f"a {qualified_name(module)} as {name}"
    return None


def width_of(layer: Any) -> int:
    """Input channels of a linear layer or a convolution, perhaps inside of an adapter."""
    for name in ("in_features", "in_channels"):
        if isinstance(count := getattr(layer, name, None), int):
            return count
    if isinstance(weight := getattr(layer, "weight", None), Tensor):
        return int(weight.shape[1])
    return width_of(next(m for m in layer.modules() if isinstance(m, nn.Linear)))


def height_of(layer: Any) -> int:
    """Output channels of a linear layer, perhaps inside of an adapter."""
    if isinstance(count := getattr(layer, "out_features", None), int):
        return count
    if isinstance(weight := getattr(layer, "weight", None), Tensor):
        return int(weight.shape[0])
    like = next(layer.parameters())
    with torch.no_grad():
        return int(layer(like.new_zeros(1, width_of(layer))).shape[1])


def _looking(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` that first asks whether the call may go around the original's submodules."""

    @functools.wraps(forward)
    def looked(self: "FusedAttention", *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            reason = self.own_code()
        else:
            # A tracer's stand-in: torch.fx follows the original, whose operators it knows.
            reason = ""
        original = None if reason is None else self.original()
        if original is None:
            return forward(self, *args, **kwargs)
        if reason not in ("", EVERYWHERE):
            self._say_once(str(reason))
        # Not by calling the module: its hooks are those of the stand-in, which runs them.
        return original.forward(*args, **kwargs)

    # A code object for each class: torch.compile counts recompilations by it.
    function: Any = looked
    function.__code__ = function.__code__.replace(co_name=forward.__name__)
    return looked


class FusedAttention(nn.Module):
    """Stands in for an attention module of some library, on that module's own tensors.

    An instance is made by ``adopt``, never by its class: it takes over the original's tables of
    parameters, buffers, submodules and hooks. So the state dict keeps its keys, whatever is done to
    a tensor through one of the two (``to``, ``load_state_dict``) is done to the other, and the
    original can be put back at any time.

    A subclass defines ``axes``, ``project``, perhaps ``why_not``, and a ``forward`` that calls
    ``attend``. A call in which something wants attention weights, or a submodule that the kernel
    goes around, runs the original's own forward instead.

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
        around: Names of submodules that the original may call and the stand-in does not.
        fused_by_default: Whether ``fused_attn=False`` in the original is somebody's wish, and not
            what its library does anyway.
        place: Name of the module in its model, for messages.
    """

    axes: ClassVar[Mapping[str, HeadAxis]] = {}
    around: ClassVar[tuple[str, ...]] = ("attn_drop", "softmax")
    fused_by_default: ClassVar[bool] = True
    cosine: ClassVar[bool] = False
    unprunable: ClassVar[str | None] = None

    num_heads: int
    head_dim: int
    heads: list[int]
    kv_group: int
    scale: float
    source: str
    backend: str | None
    place: str
    # In a tuple, so that the original is not registered as a submodule; empty after pruning.
    _original: tuple[nn.Module, ...]
    # Plain attributes that both have: what users set here holds for the original too.
    _common: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = _looking(cls.__dict__["forward"])

    if TYPE_CHECKING:
        # The submodules and attributes of the original, whatever it has.
        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def why_not(cls, original: nn.Module) -> str | None:
        """The reason why this class cannot stand in for ``original``, or None."""
        return None

    @classmethod
    def adopt(
        cls, original: nn.Module, backend: str | None = None, *, replace_eager: bool = False
    ) -> "Self":
        """A module that computes what ``original`` does, on the same tensors.

        Args:
            original: A module of the class that this one stands in for.
            backend: "auto", "fused" or "reference"; ``KDFAST_BACKEND`` if None.
            replace_eager: Whether ``fused_attn=False`` in the original has no meaning.

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
        self.place = ""
        self.kv_group = 1
        if "fused_attn" in self.__dict__ and (replace_eager or not cls.fused_by_default):
            self.__dict__["fused_attn"] = True
        self._configure()
        self.heads = list(range(self.num_heads))
        self._common = tuple(
            name
            for name, value in original.__dict__.items()
            if name[0] != "_" and self.__dict__[name] is value
        )
        return self

    def _configure(self) -> None:
        """Sets ``num_heads``, ``head_dim``, ``kv_group`` and ``scale`` where names differ."""

    def original(self) -> nn.Module | None:
        """The module that this one stands in for; None once heads were removed."""
        if not self._original:
            return None
        (original,) = self._original
        for name in self._common:
            if name in self.__dict__:
                original.__dict__[name] = self.__dict__[name]
        original.training = self.training
        if self.__dict__.get("fused_attn") is False:
            original.__dict__["fused_attn"] = False
        return original

    def eager(self) -> str | None:
        """What wants attention weights, or something that is only called on the way to them.

        None: nothing does, so the kernel may go around them.
        """
        if self.__dict__.get("fused_attn") is False:
            return "fused_attn=False"
        for name in self.around:
            module = self._modules.get(name)
            if module is not None and (reason := why_not_around(name, module)):
                return reason
        return None

    def own_code(self) -> str | None:
        """Why a call now must run the code of the original, or None."""
        if reason := self.eager():
            return reason
        return f"attention dropout {self.dropout_p()}" if self.dropping() else None

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
        Where something wants the weights, they are computed, and given to what watches them.

        Args:
            call: Result of ``project``.
            attn_mask: Boolean or additive mask that broadcasts to (B, H, N, N); not with a bias.
            is_causal: Whether a token sees only itself and the tokens before it.
        """
        q, k, v = call.q, call.k, cast(Tensor, call.v)
        dropout_p = self.dropout_p() if self.dropping() else 0.0
        what = None
        if reason := self.eager():
            what = reason
        elif dropout_p:
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
            if what != EVERYWHERE:
                self._say_once(what)
            q, k = rotated(q, call.rope, None), rotated(k, call.rope, None)
            if call.bias is not None:
                attn_mask = repeated(call.bias, q)
            if reason:
                scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
                out = self._weights(scale * q, k, attn_mask, is_causal) @ v
            else:
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask, dropout_p, is_causal, scale=call.scale
                )
        return out.transpose(1, 2).flatten(2)

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """(B, H, N, N): attention weights, through the submodules that may be watched."""
        scores = q @ k.transpose(-1, -2)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).tril() == 0, -torch.inf)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        softmax, drop = (self._modules.get(name) for name in ("softmax", "attn_drop"))
        weights: Tensor = scores.softmax(-1) if softmax is None else softmax(scores)
        return weights if drop is None else drop(weights)

    def dropout_p(self) -> float:
        """Probability to drop an attention weight in training, as the original has it now."""
        drop = self._modules.get("attn_drop")
        return drop.p if isinstance(drop, nn.Dropout) else 0.0

    def dropping(self) -> bool:
        """Whether attention weights are dropped in a call now."""
        if not self.dropout_p():
            return False
        drop = self._modules.get("attn_drop")
        return self.training or (drop is not None and drop.training)

    def _say_once(self, what: str) -> None:
        say_once(self.source, what, self.place, self.backend)

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
        if len(positions) == blocks:
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
