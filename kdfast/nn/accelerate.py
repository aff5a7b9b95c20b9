# SPDX-License-Identifier: Apache-2.0
"""Makes a model fast in place, and undoes it: attention, linear layers, whole blocks.

See docs/use/accelerate.md.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from kdfast.nn import block_swap, linear, transformers_attention
from kdfast.nn.attention import FusedAttention, own_call, qualified_name
from kdfast.nn.limits import Limits, eager_reason, switched_off
from kdfast.nn.table import FUSED, UNKNOWN, unfused_reason
from kdfast.ops._library import BACKENDS, DEFAULT_BACKEND
from kdfast.ops._matmul import SETTING


class Replacement(NamedTuple):
    """One module of a model, in the report of ``accelerate``.

    Attributes:
        name: Its name in the model; empty for the model itself.
        source: Qualified name of the class that it had or has.
        detail: What replaced it, or why it was left.
    """

    name: str
    source: str
    detail: str


@dataclass(frozen=True)
class AccelerateReport:
    """What ``accelerate`` did; prints as a table.

    Attributes:
        replaced: Attentions that run fused now, in the order of the model.
        left: Attentions that were left as they were, and exactly why.
        layers: Linear layers and patch embeddings that take the faster library now.
        layers_left: Those that were left, and exactly why.
        blocks: Blocks and MLPs that run fused in inference.
        blocks_left: Those that were left, and exactly why.
    """

    replaced: tuple[Replacement, ...]
    left: tuple[Replacement, ...]
    layers: tuple[Replacement, ...] = ()
    layers_left: tuple[Replacement, ...] = ()
    blocks: tuple[Replacement, ...] = ()
    blocks_left: tuple[Replacement, ...] = ()

    @property
    def count(self) -> int:
        """Modules that were replaced, which is how many ``restore`` puts back."""
        return len(self.replaced) + len(self.layers) + len(self.blocks)

    @property
    def complete(self) -> bool:
        """Whether there are attentions and all of them run fused."""
        return bool(self.replaced) and not self.left

    def __str__(self) -> str:
        kinds = (
            ("attention modules", self.replaced, self.left),
            ("linear layers", self.layers, self.layers_left),
            ("blocks", self.blocks, self.blocks_left),
        )
        counts = [
            f"{len(found)} of {len(found) + len(left)} {what}"
            for what, found, left in kinds
            if found or left
        ]
        title = f"kdfast.accelerate: {', '.join(counts) or 'nothing'} run{'s' * (not counts)} fused"
        if not (self.replaced or self.left):
            title += "; the model has no attention that kdfast knows (docs/use/support.md)"
        rows = [("", "modules", "class", "now, or why not", "first")]
        marked = [("fused", found) for _, found, _ in kinds]
        for mark, found in [*marked, *(("left", left) for _, _, left in kinds)]:
            alike = Counter((r.source, r.detail) for r in found)
            for (source, detail), count in alike.items():
                first = next(r.name for r in found if (r.source, r.detail) == (source, detail))
                rows.append((mark, str(count), source, detail, first or "the model itself"))
        if len(rows) == 1:
            return title
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([title, *(line.rstrip() for line in lines)])


def accelerate(
    model: nn.Module, *, backend: str | None = None, replace_eager: bool = False
) -> AccelerateReport:
    """Makes a model fast, in place and without changing its results.

    Attention *instances* are replaced by modules on the same parameters, buffers, submodules and
    hooks. Linear layers and patch embeddings change their class and take the faster of torch's
    matrix libraries, blocks and MLPs run fused in inference. State-dict keys stay, so checkpoints
    load both ways. No class is patched. Optimizers, DDP or FSDP wrappers and ``torch.compile`` may
    come before or after, except that a module that is compiled itself is left. Calling it again is
    harmless, and brings the report up to date.

    What somebody wants to see is not gone around: attentions and blocks with hooks, adapters or
    other classes on parts that would not be called any more are left, or run their own code for as
    long as they are there. So are attentions that were told not to run fused, by timm's
    ``fused_attn=False`` or transformers' ``attn_implementation="eager"``.

    Args:
        model: Any module; docs/use/support.md lists what is replaced. Vision towers of transformers
            models are switched to ``attn_implementation="kdfast"`` instead.
        backend: "auto", "fused" or "reference" for every replaced attention; ``KDFAST_BACKEND`` if
            None. With "auto" torch's own attention runs where the kernel is missing. With
            "reference" linear layers and blocks stay torch's own, too.
        replace_eager: Replace also attentions that were told not to run fused.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``backend`` is not one of the three.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    check_backend(backend)
    replaced, left = _accelerate_attention(model, backend, replace_eager)
    if (DEFAULT_BACKEND if backend is None else backend) == "reference":
        for module in model.modules():
            _put_back(module)
        return AccelerateReport(replaced, left)
    # Stand-ins of attention first: a block asks what its attention is.
    return AccelerateReport(replaced, left, *accelerate_layers(model))


Rows = tuple[Replacement, ...]


def accelerate_layers(model: nn.Module) -> tuple[Rows, Rows, Rows, Rows]:
    """``accelerate`` without attention: the last four fields of its report."""
    layers = _replace(model, linear, lambda _: "kdfast.linear", linear.why_not)
    return *layers, *_replace(model, block_swap, block_swap.detail, block_swap.why_not)


def has_fast_layers(model: nn.Module) -> bool:
    """Whether ``accelerate_layers`` changed a module of the model."""
    return any(hasattr(type(module), "kdfast_source") for module in model.modules())


def _accelerate_attention(
    model: nn.Module, backend: str | None, replace_eager: bool
) -> tuple[Rows, Rows]:
    """Replaces attentions; the rows of those that were, and of those that were left."""
    replaced: list[Replacement] = []
    left: list[Replacement] = []
    changed: dict[nn.Module, nn.Module] = {}
    inside: set[nn.Module] = set()
    by_interface = transformers_attention.attentions(model, replace_eager)
    limits = Limits(model)
    for name, module in list(model.named_modules()):
        source = qualified_name(module)
        if module in inside:
            continue
        if module in by_interface and by_interface[module] is None:
            transformers_attention.switch(module, backend, name)
            now = limits.of(module, f'attn_implementation="{transformers_attention.NAME}"')
            replaced.append(Replacement(name, source, now))
        elif reason := by_interface.get(module) or _reason(name, module, replace_eager):
            left.append(Replacement(name, source, reason))
            continue
        elif source in FUSED or isinstance(module, FusedAttention):
            fused = _stand_in(module, backend, replace_eager)
            fused.backend, fused.place = backend, name
            reason = eager_reason(fused)
            now = limits.of(module, type(fused).__name__, fused)
            row = Replacement(name, fused.source, reason or now)
            (left if reason else replaced).append(row)
            # A stand-in that has to run the original's code gives way to it.
            changed[module] = (fused.original() if reason else None) or fused
        else:
            continue
        inside.update(module.modules())
    _substitute(model, changed)
    return tuple(replaced), tuple(_innermost(left, replaced))


def _stand_in(module: nn.Module, backend: str | None, replace_eager: bool) -> FusedAttention:
    if not isinstance(module, FusedAttention):
        kind = FUSED[qualified_name(module)]
        return kind.adopt(module, backend, replace_eager=replace_eager)
    if replace_eager and "fused_attn" in module.__dict__:
        module.__dict__["fused_attn"] = True
    return module


def _replace(
    model: nn.Module,
    kind: Any,
    now: Callable[[nn.Module], str],
    why_not: Callable[[nn.Module], str | None],
) -> tuple[Rows, Rows]:
    """Gives modules another class; the rows of those that got it, and of those that were left.

    Args:
        model: The whole model.
        kind: ``linear`` or ``block_swap``, with ``is_known`` and ``replace``.
        now: What one is then.
        why_not: The reason that the class of a known module gives against it, or None.
    """
    found: list[Replacement] = []
    left: list[Replacement] = []
    setting = "KDFAST_LINEAR=torch" if SETTING == "torch" else None
    for name, module in model.named_modules():
        if not kind.is_known(module):
            continue
        source = qualified_name(module)
        if reason := setting or why_not(module) or own_call(module):
            left.append(Replacement(name, source, reason))
            kind.put_back(module)
        else:
            kind.replace(module)
            found.append(Replacement(name, source, now(module)))
    return tuple(found), tuple(left)


def _put_back(module: nn.Module) -> bool:
    return linear.put_back(module) or block_swap.put_back(module)


def _innermost(left: list[Replacement], replaced: list[Replacement]) -> list[Replacement]:
    """The entries of ``left`` without blocks that are only named after the attention they hold."""
    names = [row.name for row in (*left, *replaced)]
    return [
        row
        for row in left
        if row.detail != UNKNOWN or not any(name.startswith(f"{row.name}.") for name in names)
    ]


def restore(model: nn.Module) -> int:
    """Undoes ``accelerate``: the original modules, with the tensors as they are now.

    Args:
        model: One that ``accelerate`` changed, or any other, to which nothing happens.

    Returns:
        Number of modules put back.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: An attention lost heads since, so its original no longer exists; or the model
            is itself such a module. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    originals: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedAttention):
            if module is model:
                raise ValueError("restore: model must hold the attention, got the attention itself")
            original = module.original()
            if original is None:
                raise ValueError(f"restore: {name} must hold all its heads, got {module.heads}")
            originals[module] = original
    _substitute(model, originals)
    layers = sum(map(_put_back, list(model.modules())))
    return len(originals) + layers + transformers_attention.switch_back(model)


def check_backend(backend: str | None) -> None:
    """Raises ValueError unless ``backend`` is None or the name of one."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"accelerate: backend must be one of {BACKENDS} or None, got {backend!r}")


def _reason(name: str, module: nn.Module, replace_eager: bool) -> str | None:
    """Why an attention has to stay as it is; None if it can be replaced, or is no attention."""
    source = qualified_name(module)
    if isinstance(module, FusedAttention):
        return None
    if source not in FUSED:
        return unfused_reason(module)
    if not name:
        return "it is the model itself, which nothing holds; accelerate a module around it"
    reason = own_call(module) or FUSED[source].why_not(module)
    return reason if reason or replace_eager else switched_off(module)


def _substitute(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces submodules wherever they are registered, also in several places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                parent._modules[name] = new[child]
