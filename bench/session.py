# SPDX-License-Identifier: Apache-2.0
"""What the files of benchmarks share: sizes, compiling, checks, and the limits of the machine."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kdfast.machine.peak import library_flops, peak_flops
from kdfast.machine.timing import Candidate, timed_sample
from kdfast.testing import DRY_RUN

T = TypeVar("T")
# Raises AssertionError if the named call of a case computes something wrong.
Check = Callable[[str, Candidate], None]


def sized(full: T, tiny: T) -> T:
    """The cases of a benchmark: ``tiny`` ones in a dry run, whose times mean nothing."""
    return tiny if DRY_RUN else full


# What models are trained in on a GPU comes first there, in case that time runs out.
DTYPES = sized(
    [torch.float32, torch.bfloat16][:: -1 if torch.cuda.is_available() else 1], [torch.float32]
)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a candidate for the shapes it is called with.

    What was compiled before is forgotten: after eight shapes of one function torch would run the
    ninth uncompiled. In a dry run nothing is compiled.
    """
    if DRY_RUN:
        return function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def inference(call: Callable[[], T]) -> Callable[[], T]:
    """The call without a graph."""

    def run() -> T:
        with torch.no_grad():
            return call()

    return run


def gradients(
    call: Callable[[], Any], leaves: Sequence[Tensor], upstream: Any = None
) -> Callable[[], tuple[Tensor, ...]]:
    """The call and its gradients for ``leaves``; ``upstream`` are those of its results."""
    return lambda: torch.autograd.grad(call(), leaves, upstream)


def tensors(result: Any) -> Sequence[Tensor]:
    """One tensor, or several, as a sequence."""
    return [result] if isinstance(result, Tensor) else result


def near(want: Tensor | Sequence[Tensor], tolerance: float) -> Check:
    """Checks that a call returns ``want``, or each of several tensors, up to a relative error."""
    exact = [x.detach().double() for x in tensors(want)]

    def check(name: str, call: Candidate) -> None:
        for got, right in zip(tensors(call()), exact, strict=True):
            error = ((got.detach().double() - right).norm() / right.norm()).item()
            assert error <= tolerance, f"{name}: relative error {error:.2e}, above {tolerance:.0e}"

    return check


class Rate(NamedTuple):
    """Floating-point operations a second of a dtype.

    Attributes:
        limit: What no code exceeds: a loop in registers; on a GPU the best large matrix product.
        library: The best large product of the libraries.
    """

    limit: float
    library: float


def rate(dtype: torch.dtype, cuda: bool) -> Rate:
    """Measures the rates of a dtype."""
    if DRY_RUN or cuda:
        # A GPU is not full before that.
        product = matmul_rate(torch.device("cuda" if cuda else "cpu"), dtype, sized(8192, 64))
        return Rate(product, product)
    return Rate(peak_flops(dtype), library_flops(dtype))


def copy_seconds(device: torch.device, nbytes: int) -> float:
    """Best of seven plain copies that read and write ``nbytes`` in all: the limit of moving them.

    The size matters: what fits in a cache moves several times faster than what does not.
    """
    src = torch.ones(max(1, nbytes // 2), dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    repeats = min(1 << 10, max(1, (1 << 24) // max(nbytes, 1)))
    return min(timed_sample(lambda: dst.copy_(src), repeats)[0] for _ in range(7))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP per second of the best of seven square matrix products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(timed_sample(lambda: a @ b, 3)[0] for _ in range(7))
    return 2 * size**3 / best
