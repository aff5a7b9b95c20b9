# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark session, as result files hold them, and the limits measured beside them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from kdfast.machine.timing import timed_sample
from kdfast.testing import DRY_RUN


@dataclass
class Row:
    """One candidate of one comparison; times in milliseconds."""

    op: str
    case: str
    candidate: str
    ms: float  # median of the fast samples, of all samples if fewer than FEW are fast
    ms_all: float
    iqr: float
    samples: int
    fast: int
    gb_s: float | None = None
    gflop_s: float | None = None
    limit_ms: float | None = None
    limit_share: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None


@dataclass
class Results:
    """Machine, versions and rows of one session, as written to ``bench/results``."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # what was not timed, and why
    cases: dict[str, float] = field(default_factory=dict)  # seconds of a benchmark, all in all

    def to_json(self) -> dict[str, Any]:
        """Plain containers for ``json.dump``."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Results":
        """Inverse of ``to_json``."""
        rows = [Row(**row) for row in found["rows"]]
        return cls(found["machine"], rows, found["left_out"], found["cases"])


T = TypeVar("T")


def sized(full: T, tiny: T) -> T:
    """The cases of a benchmark: ``tiny`` ones in a dry run, whose times mean nothing."""
    return tiny if DRY_RUN else full


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a candidate for the shapes it is called with.

    What was compiled before is forgotten: after eight shapes of one function torch would run the
    ninth uncompiled. In a dry run nothing is compiled.
    """
    if DRY_RUN:
        return function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def copy_seconds(device: torch.device, nbytes: int) -> float:
    """Best of seven plain copies that read and write ``nbytes`` in all: the limit of moving them.

    The size matters: what fits in a cache moves several times faster than what does not.
    """
    src = torch.ones(max(1, nbytes // 2), dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    repeats = max(1, (1 << 24) // max(nbytes, 1))
    return min(timed_sample(lambda: dst.copy_(src), repeats)[0] for _ in range(7))


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP per second of the best of seven square matrix products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(timed_sample(lambda: a @ b, 3)[0] for _ in range(7))
    return 2 * size**3 / best
