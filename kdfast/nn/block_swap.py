# SPDX-License-Identifier: Apache-2.0
"""Gives a block or an MLP a class that runs fused in inference, and takes it away again."""

import functools
from typing import Any

from torch import nn

from kdfast.nn import swin_blocks
from kdfast.nn.attention import EVERYWHERE, FusedAttention, qualified_name
from kdfast.nn.block import run_block, run_mlp
from kdfast.nn.block_table import BLOCKS, MLPS
from kdfast.nn.table import unfused_reason
from kdfast.ops._packed import forget, hooked, hooked_everywhere, is_plain_linear


class FusedBlock:
    """Marks the classes of ``fused_class``."""

    kdfast_source: type[nn.Module]


@functools.cache
def fused_class(source: Any) -> type[nn.Module]:
    """A subclass of a block's or MLP's class, under its name, that runs fused where it can.

    The name stays: others choose modules by it, such as wrapping policies of FSDP.
    """
    name = f"{source.__module__}.{source.__qualname__}"
    run: Any = run_block if name in BLOCKS else run_mlp
    read = BLOCKS[name] if name in BLOCKS else MLPS[name]

    @functools.wraps(source.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = run(self, read, args, kwargs)
        return source.forward(self, *args, **kwargs) if out is None else out

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # An unpickler, in another process perhaps, could not find the class by its name.
        return rebuild, (source,), self.__dict__.copy()

    members: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce}
    for key in ("__doc__", "__module__", "__qualname__"):
        members[key] = getattr(source, key)
    members["kdfast_source"] = source
    return type(source.__name__, (source, FusedBlock), members)


def rebuild(source: Any) -> nn.Module:
    """An empty module of the fused class of ``source``, for copies and unpicklers."""
    cls: Any = fused_class(source)
    module: nn.Module = cls.__new__(cls)
    return module


def is_known(module: nn.Module) -> bool:
    """Whether a module is a block or an MLP that can run fused, or one that does."""
    return qualified_name(module) in BLOCKS or qualified_name(module) in MLPS


def why_not(module: nn.Module) -> str | None:
    """Why a known module would run its own code in inference whatever its input, or None."""
    name = qualified_name(module)
    read: Any = BLOCKS[name] if name in BLOCKS else MLPS[name]
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.__dict__["training"] = False
        parts = read(module, None)
    finally:
        for part, mode in modes:
            part.__dict__["training"] = mode
    return None if parts is not None else f"{_obstacle(module)}; its own code runs"


def _obstacle(module: nn.Module) -> str:
    """What keeps a block from being read."""
    if hooked_everywhere():
        return EVERYWHERE
    for name, part in module.named_modules():
        if name and hooked(part):
            return f"a hook on {name}, or a forward of its own there"
        if isinstance(part, FusedAttention):
            if reason := part.own_code():
                return reason
        elif unfused_reason(part):
            return f"{name} is not fused"
    if reason := swin_blocks.unfilled(module):
        return reason
    for name, part in module.named_modules():
        wraps = hasattr(part, "base_layer") or hasattr(part, "parametrizations")
        if wraps or (isinstance(part, nn.Linear) and not is_plain_linear(part)):
            return f"{name} is a {qualified_name(part)}, which may compute anything"
    return "one of its parts is of a kind that kdfast does not know"


def detail(module: nn.Module) -> str:
    """What a known module does once it is replaced."""
    return "fused in inference" + swin_blocks.CONDITIONS.get(qualified_name(module), "")


def replace(module: nn.Module) -> None:
    """Makes a known module run fused where it can."""
    if not isinstance(module, FusedBlock):
        source: Any = type(module)
        module.__class__ = fused_class(source)


def put_back(module: nn.Module) -> bool:
    """Undoes ``replace``; whether there was something to undo."""
    if not isinstance(module, FusedBlock):
        return False
    layer: Any = module
    layer.__class__ = layer.kdfast_source
    forget(module)
    return True
