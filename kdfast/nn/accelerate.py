# SPDX-License-Identifier: Apache-2.0
"""Puts fused attention modules into a model, and takes them out again.

See docs/use/accelerate.md.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from kdfast.nn import transformers_attention
from kdfast.nn.attention import FusedAttention, qualified_name
from kdfast.nn.table import FUSED, UNKNOWN, unfused_reason
from kdfast.ops._library import BACKENDS


class Replacement(NamedTuple):
    """One attention of a model, in the report of ``accelerate``.

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
    """

    replaced: tuple[Replacement, ...]
    left: tuple[Replacement, ...]

    @property
    def complete(self) -> bool:
        """Whether there are attentions and all of them run fused."""
        return bool(self.replaced) and not self.left

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.left)
        title = f"kdfast.accelerate: {len(self.replaced)} of {total} attention modules run fused"
        rows = [("", "modules", "class", "now, or why not", "first")]
        for mark, found in (("fused", self.replaced), ("left", self.left)):
            alike = Counter((r.source, r.detail) for r in found)
            for (source, detail), count in alike.items():
                first = next(r.name for r in found if (r.source, r.detail) == (source, detail))
                rows.append((mark, str(count), source, detail, first or "the model itself"))
        if len(rows) == 1:
            return title
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([title, *(line.rstrip() for line in lines)])


def accelerate(model: nn.Module, *, backend: str | None = None) -> AccelerateReport:
    """Runs a model's attentions on the fused kernels, in place and without changing its results.

    Attention *instances* are replaced by modules on the same parameters, buffers, submodules and
    hooks; state-dict keys stay, so checkpoints load both ways. No class is patched. Optimizers,
    DDP or FSDP wrappers and ``torch.compile`` may come before or after, except that a module that
    is compiled itself is left. Calling it again is harmless.

    Args:
        model: Any module; docs/use/support.md lists what is replaced. Vision towers of transformers
            models are switched to ``attn_implementation="kdfast"`` instead.
        backend: "auto", "fused" or "reference" for every replaced module; ``KDFAST_BACKEND`` if
            None. With "auto" torch's own attention runs where the kernel is missing.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``backend`` is not one of the three.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    check_backend(backend)
    replaced: list[Replacement] = []
    left: list[Replacement] = []
    fused: dict[nn.Module, FusedAttention] = {}
    inside: set[nn.Module] = set()
    by_interface = transformers_attention.attentions(model)
    for name, module in list(model.named_modules()):
        source = qualified_name(module)
        if module in inside:
            continue
        if isinstance(module, FusedAttention):
            module.backend = backend
            replaced.append(Replacement(name, module.source, type(module).__name__))
        elif module in by_interface and by_interface[module] is None:
            transformers_attention.switch(module, backend)
            replaced.append(Replacement(name, source, 'attn_implementation="kdfast"'))
        elif reason := by_interface.get(module) or _reason(name, module):
            left.append(Replacement(name, source, reason))
            continue
        elif source in FUSED:
            fused[module] = FUSED[source].adopt(module, backend)
            replaced.append(Replacement(name, source, type(fused[module]).__name__))
        else:
            continue
        inside.update(module.modules())
    _substitute(model, fused)
    return AccelerateReport(tuple(replaced), tuple(_innermost(left, replaced)))


def _innermost(left: list[Replacement], replaced: list[Replacement]) -> list[Replacement]:
    """The entries of ``left`` without blocks that are only named after the attention they hold."""
    names = [row.name for row in (*left, *replaced)]
    return [
        row
        for row in left
        if row.detail != UNKNOWN or not any(name.startswith(f"{row.name}.") for name in names)
    ]


def restore(model: nn.Module) -> int:
    """Puts the original attention modules back, with the tensors as they are now.

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
    return len(originals) + transformers_attention.switch_back(model)


def check_backend(backend: str | None) -> None:
    """Raises ValueError unless ``backend`` is None or the name of one."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"accelerate: backend must be one of {BACKENDS} or None, got {backend!r}")


def _reason(name: str, module: nn.Module) -> str | None:
    """Why an attention has to stay as it is; None if it can be replaced, or is no attention."""
    source = qualified_name(module)
    if source not in FUSED:
        return unfused_reason(module)
    if not name:
        return "it is the model itself, which nothing holds; accelerate a module around it"
    if "forward" in module.__dict__:
        return "its instance has a forward of its own"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return "it is compiled already; accelerate first, then compile"
    return FUSED[source].why_not(module)


def _substitute(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces submodules wherever they are registered, also in several places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                parent._modules[name] = new[child]
