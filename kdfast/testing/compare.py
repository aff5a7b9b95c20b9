# SPDX-License-Identifier: Apache-2.0
"""Compares results: the tolerance rule, and outputs together with their gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_no_worse(
    name: str, fused: Tensor, exact: Tensor, eager: Tensor, *, eps: float | None = None
) -> None:
    """Raises AssertionError unless ``fused`` is finite and at most twice as wrong as ``eager``.

    The rule, in the maximum and in the root mean square: err(fused) <= 2 * err(eager) + eps *
    size(exact), with eps of the dtype under test. It needs no tolerance chosen by hand: the eager
    result in the same dtype says what rounding costs.

    Args:
        name: Printed in the message.
        fused: Result under test, any shape, low precision or fp32.
        exact: The same result of the reference in fp64.
        eager: The same result of the reference in the dtype under test.
        eps: In place of the dtype's own.
    """
    if fused.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(fused.shape)}, want {tuple(exact.shape)}")
    if not torch.isfinite(fused).all():
        raise AssertionError(f"{name}: not finite")
    if fused.numel() == 0:
        return
    eps = torch.finfo(eager.dtype).eps if eps is None else eps
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "max": lambda x: x.abs().max(),
        "rms": lambda x: x.square().mean().sqrt(),
    }
    for kind, norm in norms.items():
        error = norm(fused.double() - exact).item()
        limit = 2 * norm(eager.double() - exact).item() + eps * norm(exact).item()
        if error > limit:
            raise AssertionError(f"{name}: {kind} error {error:.3e} is above {limit:.3e}")


def assert_right(name: str, fused: Tensor, exact: Tensor, eager: Tensor) -> None:
    """``assert_no_worse``, or close to ``exact`` where ``eager`` is no yardstick.

    That is in fp64, which is its own reference, and for a single number, of which the eager error
    is a matter of luck. Arguments as in ``assert_no_worse``.
    """
    if fused.dtype == torch.float64:
        torch.testing.assert_close(fused, exact, rtol=1e-12, atol=1e-13, msg=name)
    elif fused.dim() == 0:
        torch.testing.assert_close(fused.double(), exact, rtol=5e-7, atol=1e-7, msg=name)
    else:
        assert_no_worse(name, fused, exact, eager)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over that of ``want``."""
    return ((got - want).norm() / want.norm()).item()


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of ``loss`` by every parameter, by name."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def run(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], *, seed: int = 0
) -> list[Tensor]:
    """Outputs of ``function(*inputs)`` and the gradients of a random projection of them.

    The projection is drawn in fp64 and rounded, so runs in several dtypes see the same one.
    Integer and boolean inputs get no gradient; a missing gradient comes back as zeros.
    """
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    for out in outputs:
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        total = total + (out * weight).sum().double()
    total.backward()
    grads = [
        torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x.is_floating_point()
    ]
    return [*(out.detach() for out in outputs), *grads]
