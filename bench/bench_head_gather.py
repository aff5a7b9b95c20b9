# SPDX-License-Identifier: Apache-2.0
"""head_gather against indexing and index_select: a weight, a projection, an activation, a block."""

import pytest
import torch

import kdfast
from bench import session
from bench.compare import Compare
from kdfast.ops import head_gather as op
from kdfast.ops import head_gather_block as block

NO_CUDA = torch.cuda.is_available() and "cuda" not in op.FUSED_ON
pytestmark = pytest.mark.skipif(NO_CUDA, reason="kdfast._C was built without a CUDA compiler")
HEADS = list(range(0, 16, 2))
NAMES = ("kdfast", "eager", "index_select")
CASES = {
    "q weight (1024, 1024)": ((1024, 1024), 0),
    "proj weight (1024, 1024)": ((1024, 1024), 1),
    "activation (8, 257, 1024)": ((8, 257, 1024), -1),
}


@pytest.mark.candidates(*NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def bench_gather(compare: Compare, case: str, dtype: torch.dtype) -> None:
    shape, dim = CASES[case]
    x = torch.randn(shape).to(compare.device, dtype)
    args = {"head_dim": 64, "dim": dim}
    positive = dim % x.dim()
    index = torch.tensor(HEADS)
    rows = (index[:, None] * 64 + torch.arange(64)).flatten().to(compare.device)
    candidates = {
        "kdfast": lambda: kdfast.head_gather(x, HEADS, backend="fused", **args),
        "eager": lambda: op.reference(x, HEADS, 64, positive),
        "index_select": lambda: x.index_select(positive, rows),
    }
    want = candidates["eager"]()
    title = f"{case} {dtype}"
    compare("head_gather", title, candidates, check=session.near(want, 0), nbytes=2 * want.nbytes)


@pytest.mark.candidates(*NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_block(compare: Compare, dtype: torch.dtype) -> None:
    """Weights of q, k, v and proj and two biases of a block of EVA-L, as pruning takes them."""
    shapes = [(1024, 1024)] * 4 + [(1024,)] * 2
    tensors = [torch.randn(shape).to(compare.device, dtype) for shape in shapes]
    dims = [0, 0, 0, 1, 0, 0]
    index = torch.tensor(HEADS)
    rows = (index[:, None] * 64 + torch.arange(64)).flatten().to(compare.device)
    candidates = {
        "kdfast": lambda: kdfast.head_gather_block(
            tensors, HEADS, head_dim=64, dims=dims, backend="fused"
        ),
        "eager": lambda: block.reference(tensors, HEADS, 64, dims),
        "index_select": lambda: [
            x.index_select(dim, rows) for x, dim in zip(tensors, dims, strict=True)
        ],
    }
    want = candidates["eager"]()
    compare(
        "head_gather_block",
        f"block of 1024 channels {dtype}",
        candidates,
        check=session.near(want, 0),
        nbytes=2 * sum(x.nbytes for x in want),
    )
