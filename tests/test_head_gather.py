# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import kdfast
from kdfast.ops import head_gather as op
from kdfast.testing import run

# (shape, dim, head_dim): weight rows, projection columns, bias, activation, odd runs, no rows.
CASES = [
    ((96, 40), 0, 16),
    ((40, 96), 1, 16),
    ((96,), 0, 16),
    ((2, 5, 96), -1, 16),
    ((3, 18, 7), 1, 3),
    ((0, 6), 1, 2),
    ((6, 0), 0, 2),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-9, 9, shape).to(dtype)


def test_reference_literal() -> None:
    x = torch.arange(12).view(6, 2)
    got = kdfast.head_gather(x, [2, 0], head_dim=2, dim=0, backend="reference")
    assert got.tolist() == [[8, 9], [10, 11], [0, 1], [2, 3]]
    got = kdfast.head_gather(x.t(), [1], head_dim=2, dim=1, backend="reference")
    assert got.tolist() == [[4, 6], [5, 7]]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim", "head_dim"), CASES)
def test_fused_is_bitwise_reference(
    shape: tuple[int, ...], dim: int, head_dim: int, dtype: torch.dtype
) -> None:
    x = make(shape, dtype)
    count = shape[dim] // head_dim
    for heads in ([0], list(range(count)), list(range(count))[::-2]):
        kwargs = {"heads": heads, "head_dim": head_dim, "dim": dim}
        fused = kdfast.head_gather(x, backend="fused", **kwargs)
        assert torch.equal(fused, kdfast.head_gather(x, backend="reference", **kwargs))
        assert fused.is_contiguous()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("stride", ["transposed", "sliced", "expanded"])
def test_layout(stride: str) -> None:
    x = {
        "transposed": torch.randn(7, 48).t(),
        "sliced": torch.randn(50, 9)[1:49, ::2],
        "expanded": torch.randn(48, 1).expand(48, 5),
    }[stride]
    args = {"heads": [2, 0], "head_dim": 16, "dim": 0}
    want = kdfast.head_gather(x, backend="reference", **args)
    assert torch.equal(kdfast.head_gather(x, backend="fused", **args), want)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("shape", "dim", "head_dim"), CASES[:5])
def test_backward_scatters(shape: tuple[int, ...], dim: int, head_dim: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    results = [
        run(lambda t, b=b: op.head_gather(t, [2, 1], head_dim=head_dim, dim=dim, backend=b), [x])
        for b in ("fused", "reference")
    ]
    for fused, eager in zip(*results, strict=True):
        assert torch.equal(fused, eager)
    leaf = x.requires_grad_()
    call = lambda t: op.head_gather(t, [2, 1], head_dim=head_dim, dim=dim, backend="fused")  # noqa: E731
    assert torch.autograd.gradcheck(call, (leaf,))
    assert torch.autograd.gradgradcheck(call, (leaf,))


@pytest.mark.usefixtures("compiled")
def test_registration() -> None:
    x = torch.randn(64, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.kdfast.head_gather.default, (x, [1, 3], 16, 0))
    grad = torch.randn(5, 32, requires_grad=True)
    torch.library.opcheck(torch.ops.kdfast.head_gather_bwd.default, (grad, [1, 3], 16, 1, 4))


def test_compile() -> None:
    def gather(x: torch.Tensor) -> torch.Tensor:
        return kdfast.head_gather(x, [3, 1], head_dim=16, dim=0) * 2

    x = torch.randn(64, 5, requires_grad=True)
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert torch.equal(out, gather(x))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.view(4, 16, 5)[:, 0, 0].tolist() == [0, 2, 0, 2]


def test_cpu_tensor_of_heads() -> None:
    x = torch.randn(64)
    want = kdfast.head_gather(x, [3, 1], head_dim=16, dim=0)
    assert torch.equal(kdfast.head_gather(x, torch.tensor([3, 1]), head_dim=16, dim=0), want)


@pytest.mark.usefixtures("compiled")
def test_large_input_uses_all_threads() -> None:
    # More than one thread takes: what the threads write has to meet without a gap.
    torch.set_num_threads(2)
    x = torch.randn(2048, 4096)
    fused = kdfast.head_gather(x, list(range(0, 128, 2)), head_dim=16, dim=0, backend="fused")
    assert torch.equal(fused, x.view(128, 16, 4096)[::2].flatten(0, 1))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dim", "error", "match"),
    [
        ([0], 16, 3, ValueError, r"dim must be in \[-2, 2\), got 3"),
        ([0], 15, 0, ValueError, "multiple of head_dim, got 64 and 15"),
        ([0], 0, 0, ValueError, "multiple of head_dim"),
        ([4], 16, 0, ValueError, r"must be in \[0, 4\), got \[4\]"),
        ([-1], 16, 0, ValueError, r"must be in \[0, 4\)"),
        ([1, 1], 16, 0, ValueError, "must not repeat"),
        ([], 16, 0, ValueError, "at least one head"),
        ([0.5], 16, 0, TypeError, "must hold ints"),
        ([True], 16, 0, TypeError, "must hold ints"),
        (torch.tensor([0.5]), 16, 0, TypeError, "1-D integer tensor"),
    ],
)
def test_rejects(heads, head_dim, dim, error, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=match):
        kdfast.head_gather(torch.randn(64, 5), heads, head_dim=head_dim, dim=dim)


@pytest.mark.usefixtures("compiled")
def test_ops_read_nothing_beyond_their_input() -> None:
    """Called past the checks in Python, too: a division by zero would end the process."""
    ops = torch.ops.kdfast
    for head_dim in (0, -2, 3):
        with pytest.raises(ValueError, match=f"must hold heads of {head_dim}"):
            ops.head_gather(torch.ones(4, 8), [0], head_dim, 0)
        with pytest.raises(ValueError, match=f"must hold heads of {head_dim}"):
            ops.head_gather_bwd(torch.ones(4, 8), [0], head_dim, 0, 2)
    with pytest.raises(ValueError, match="grad must hold 3 heads, got 1"):
        ops.head_gather_bwd(torch.ones(2, 8), [0, 1, 2], 2, 0, 3)
    with pytest.raises(ValueError, match=r"head must be in \[0, 2\), got 2"):
        ops.head_gather_bwd(torch.ones(2, 8), [2], 2, 0, 2)


def test_backend_choice() -> None:
    x = torch.randn(64)
    with pytest.raises(ValueError, match="backend must be one of"):
        kdfast.head_gather(x, [0], head_dim=16, dim=0, backend="fast")
    wide = torch.randn(op.MAX_HEADS + 1)
    with pytest.raises(NotImplementedError, match="more than 512 heads"):
        kdfast.head_gather(wide, [0], head_dim=1, dim=0, backend="fused")
