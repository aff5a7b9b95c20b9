# SPDX-License-Identifier: Apache-2.0
"""The op library, the compiled extension, and the one rule that picks fused or reference."""

import collections
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kdfast.ops._checks import check_tensors
from kdfast.ops._torch_private import (
    AFTER_AUTOGRAD,
    BelowAutograd,
    any_requires_grad,
    has_kernel,
    schema_arguments,
)
from kdfast.ops._watch import TRANSFORM, has_tangent, transformed, watcher

BACKENDS = ("auto", "fused", "reference")


class FallbackWarning(UserWarning):
    """An op with a compiled kernel ran its eager reference instead; the message says why."""


class NotCompiledWarning(FallbackWarning):
    """An op has no compiled kernel for the device."""


def _load_extension() -> ModuleType | None:
    """Returns ``kdfast._C``, or None where it was not built; a broken build raises."""
    if importlib.util.find_spec("kdfast._C") is None:
        return None
    try:
        return importlib.import_module("kdfast._C")
    except ImportError as error:
        if str(error).startswith("KDFAST_"):
            raise  # a setting, not the build
        raise ImportError(
            "kdfast._C was built but cannot be loaded: it needs torch 2.10 or newer, here is "
            f"{torch.__version__}. To build it again: `pip install --no-build-isolation -e .`"
        ) from error


def _default_backend() -> str:
    backend = os.environ.get("KDFAST_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"KDFAST_BACKEND: must be one of {BACKENDS}, got {backend!r}")
    return backend


EXTENSION = _load_extension()
# Only looked up here; the kernels import it when they first run.
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEFAULT_BACKEND = _default_backend()
# Read once: a call into the extension would break torch.compile(fullgraph=True).
CPU_ISA: str | None = EXTENSION.cpu_isa() if EXTENSION else None
LIB = torch.library.Library("kdfast", "DEF")
_warned: set[tuple[str, str]] = set()


def fused_devices(op: str) -> frozenset[str]:
    """Device types on which ``op`` has a compiled kernel; asked once, when its file is imported."""
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return frozenset(device for device, key in keys.items() if has_kernel(f"kdfast::{op}", key))


def not_compiled(op: str, device: torch.device, fused_on: frozenset[str]) -> str | None:
    """The reason why no compiled kernel of ``op`` can run on ``device``, or None."""
    if device.type in fused_on:
        return None
    return f"{op} has no compiled kernel for {device.type} in this build"


def call_below_autograd(op: Any, *args: Any) -> Any:
    """``op(*args)``, past its autograd kernel where no gradient is asked for: 4 us less."""
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled() and any_requires_grad(*args):
        return op(*args)
    with BelowAutograd():
        return op(*args)


def argument_names(name: str) -> list[str]:
    """Names of the arguments in the schema of op ``name``, in its order.

    Raises:
        ValueError: An argument has a default: the dispatcher drops an argument that is equal to its
            default, and what follows could no longer count on its place.
    """
    arguments = schema_arguments(getattr(torch.ops.kdfast, name).default)
    optional = [argument.name for argument in arguments if argument.has_default_value()]
    if optional:
        raise ValueError(f"{name}: no argument of the schema may have a default, got {optional}")
    return [argument.name for argument in arguments]


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the fake of op ``name``: it makes results without values.

    It gets every argument of the schema by its name: it names those that the results' shapes,
    strides and dtypes depend on, and takes the others as ``**_``.
    """
    names = argument_names(name)
    arguments = schema_arguments(getattr(torch.ops.kdfast, name).default)
    needed = [place for place, x in enumerate(arguments) if str(x.type) == "Tensor"]

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            check_tensors(name, [names[i] for i in needed], *(args[i] for i in needed))
            _check_one_device(name, args)
            return fake(**dict(zip(names, args, strict=True)))

        torch.library.register_fake(f"kdfast::{name}", call, lib=LIB)
        return fake

    return register


def register_flops(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers the decorated function as what torch's FlopCounterMode counts for op ``name``.

    It gets the arguments of the schema by name, with shapes in the place of tensors, as
    ``register_fake`` does. It counts the operations of the matrix products that are computed.
    """
    names = argument_names(name)

    def register(flops: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, out_shape: Any = None, **_: Any) -> int:
            return flops(**dict(zip(names, args, strict=True)))

        register_flop_formula(getattr(torch.ops.kdfast, name))(count)
        return flops

    return register


def _check_one_device(name: str, args: Sequence[Any]) -> None:
    """Raises ValueError for a meta tensor beside another one, which would get an empty result."""
    parts = (x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg]))
    devices = {x.device.type for x in parts if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"{name}: tensors must be on one device, got {sorted(devices)}")


def register_launcher(name: str, launcher: str, cpu_arguments: int = 0) -> Callable[..., Any]:
    """Registers a function of ``kdfast.kernels`` as op ``name`` on CUDA, where there is Triton.

    Args:
        name: Name of an op defined on ``LIB``.
        launcher: Module and function, as in "kd_loss.forward"; imported by the first call. Its
            parameters are the arguments of the schema.
        cpu_arguments: So many of the schema's last arguments are for the CPU's kernel alone.

    Returns:
        The registered function.
    """
    module, function = launcher.split(".")
    count = len(argument_names(name)) - cpu_arguments

    @functools.cache
    def launch() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(
            importlib.import_module(f"kdfast.kernels.{module}"), function
        )
        return found

    def call(*args: Any) -> Any:
        return launch()(*args[:count])

    if HAS_TRITON:
        LIB.impl(name, call, "CUDA")
    return call


def register_gradient(
    name: str,
    backward: Callable[..., dict[str, Tensor | None]],
    setup: Callable[..., None] | None = None,
) -> None:
    """The derivative of op ``name``: ``torch.library.register_autograd`` at half its cost a call.

    At every call torch's own looks for arguments with a default, which the dispatcher leaves out,
    in time quadratic in their number: 30 us for attention. Ours have none.

    Args:
        name: Name of an op defined on ``LIB``.
        backward: Takes the context and one gradient, or None, per output. Returns the gradients of
            arguments by the arguments' names; those that it does not name get none.
            ``context.needs`` says of each argument by its name whether a gradient is asked for.
        setup: Called after the forward pass with the context, the arguments as a named tuple and
            the output.
    """
    op = getattr(torch.ops.kdfast, name).default
    names = argument_names(name)
    places = {argument: place for place, argument in enumerate(names)}
    Arguments: Any = collections.namedtuple(f"{name}_arguments", names)  # type: ignore[misc]
    named = functools.partial(tuple.__new__, Arguments)

    def call(keyset: Any, args: Sequence[Any]) -> Any:
        with BelowAutograd():
            return op.redispatch(keyset & AFTER_AUTOGRAD, *args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *arguments, keyset = args
            output = call(keyset, arguments)
            if setup is not None:
                setup(ctx, named(arguments), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            needs = ctx.needs_input_grad
            ctx.needs = named(needs[:-1])  # the last is that of the keyset
            found = backward(ctx, *grads)
            results: list[Tensor | None] = [None] * len(needs)
            try:
                for argument in found:
                    results[places[argument]] = found[argument]
            except KeyError:
                raise TypeError(
                    f"{name}: gradients must be of {names}, got those of {list(found)}"
                ) from None
            return tuple(results)

    def autograd(keyset: Any, *args: Any) -> Any:
        tracked = torch.is_grad_enabled() and any_requires_grad(*args)
        if transformed():
            refuse_transform(name, tracked, args)
        return Gradient.apply(*args, keyset) if tracked else call(keyset, args)

    Gradient.__name__ = f"{name}_gradient"
    LIB.impl(name, autograd, "Autograd", with_keyset=True)


def refuse_transform(name: str, tracked: bool, args: tuple[Any, ...]) -> None:
    """Raises NotImplementedError where op ``name`` would lose a derivative under a transform.

    Only whoever calls ``torch.ops.kdfast`` comes here; the public functions take torch's operators.
    """
    if tracked or has_tangent(args):
        raise NotImplementedError(
            f"torch.ops.kdfast.{name} has no derivative under torch.func and none in forward mode; "
            "call the function of kdfast, which takes torch's operators there"
        )


def forbid_gradient(name: str) -> None:
    """Makes op ``name`` raise NotImplementedError where a derivative of it is asked for."""
    op = getattr(torch.ops.kdfast, name).default

    def autograd(keyset: Any, *args: Any) -> Any:
        if (torch.is_grad_enabled() and any_requires_grad(*args)) or (
            transformed() and has_tangent(args)
        ):
            raise NotImplementedError(
                f"torch.ops.kdfast.{name} has no derivative; call the function of kdfast"
            )
        with BelowAutograd():
            return op.redispatch(keyset & AFTER_AUTOGRAD, *args)

    LIB.impl(name, autograd, "Autograd", with_keyset=True)


def second_derivative(
    outputs: Callable[..., Sequence[Tensor]],
    inputs: dict[str, Tensor | None],
    grads: Sequence[Tensor | None],
) -> dict[str, Tensor | None]:
    """Gradients that can be differentiated again, by torch's own operators.

    Args:
        outputs: Computes an op's outputs from ``inputs``, as its reference does.
        inputs: Tensors by their names, of which those that require one get a gradient.
        grads: Of the outputs.
    """
    # Views: one tensor may be several inputs.
    apart = {k: x.view_as(x) for k, x in inputs.items() if x is not None and x.requires_grad}
    found = outputs(**{**inputs, **apart})
    pairs = [(x, g) for x, g in zip(found, grads, strict=True) if g is not None and x.requires_grad]
    if not pairs:
        return {}
    results, upstream = zip(*pairs, strict=True)
    got = torch.autograd.grad(
        results, list(apart.values()), upstream, create_graph=True, allow_unused=True
    )
    return dict(zip(apart, got, strict=True))


def forbid_second_derivative(name: str, op: str) -> None:
    """Makes a derivative of op ``name``, the backward pass of ``op``, raise NotImplementedError."""

    def twice(ctx: Any, *grads: Tensor | None) -> dict[str, Tensor | None]:
        raise NotImplementedError(
            f"{op}: the fused op has no second derivative; use backend='reference'"
        )

    register_gradient(name, twice)


def use_fused(
    op: str,
    backend: str | None,
    reason: str | None,
    *,
    compiled: bool = True,
    given: Sequence[Tensor | None] = (),
) -> bool:
    """Decides between the compiled kernel and the eager reference.

    Args:
        op: Name of the op, for messages.
        backend: The caller's choice; ``KDFAST_BACKEND`` if None.
        reason: Why the compiled kernel cannot run this input, or None.
        compiled: False if the reason is that no kernel exists for the device.
        given: Tensors of the call: with a ``watcher`` "auto" is the reference, without a warning.

    Returns:
        True for the compiled kernel.

    Raises:
        ValueError: ``backend`` is not one of "auto", "fused", "reference".
        NotImplementedError: ``backend="fused"`` and there is a reason against it.
    """
    backend = DEFAULT_BACKEND if backend is None else backend
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {BACKENDS} or None, got {backend!r}")
    if backend == "reference" or (backend == "auto" and watcher(*given)):
        return False
    if transformed():
        reason = TRANSFORM
    if reason is None:
        return True
    if backend == "fused":
        raise NotImplementedError(f"{op}: backend='fused' cannot run here: {reason}")
    # A Python warning would break torch.compile(fullgraph=True); `kdfast.info` still lists it.
    if not torch.compiler.is_compiling() and (op, reason) not in _warned:
        _warned.add((op, reason))
        category = FallbackWarning if compiled else NotCompiledWarning
        warnings.warn(f"{op} runs its eager reference: {reason}", category, stacklevel=4)
    return False
