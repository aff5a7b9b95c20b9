# SPDX-License-Identifier: Apache-2.0
"""head_gather_block: the tensors of a block as head_gather takes them one by one."""

from typing import Any

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast.ops import head_gather_block as op

HEADS, DIM, WIDTH = 4, 6, 10
DIMS = [0, 0, 0, 0, 1, -1]


def block(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q and k weights, a sliced v, a bias, a projection and an activation."""
    inner = HEADS * DIM
    shapes = [(inner, WIDTH), (inner, WIDTH), (inner, 2 * WIDTH), (inner,), (WIDTH, inner)]
    made = [torch.randint(-9, 9, shape).to(dtype) for shape in [*shapes, (2, 3, inner)]]
    made[2] = made[2][:, ::2]
    return made


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("heads", [[0], [3, 1], list(range(HEADS))[::-1]])
def test_each_is_head_gather(heads: list[int], backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        tensors = block(dtype)
        got = kdfast.head_gather_block(tensors, heads, head_dim=DIM, dims=DIMS, backend=backend)
        for x, y, dim in zip(tensors, got, DIMS, strict=True):
            want = kdfast.head_gather(x, heads, head_dim=DIM, dim=dim, backend="reference")
            assert torch.equal(y, want)
            assert y.is_contiguous() and y.dtype == dtype


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_literal(backend: str) -> None:
    weight, bias = torch.arange(12).view(6, 2), torch.arange(6.0)
    got = kdfast.head_gather_block([weight, bias], [2, 0], head_dim=2, dims=[0, 0], backend=backend)
    assert got[0].tolist() == [[8, 9], [10, 11], [0, 1], [2, 3]]
    assert got[1].tolist() == [4, 5, 0, 1]
    packed = torch.arange(12).view(12, 1).unflatten(0, (3, -1))
    got = kdfast.head_gather_block([packed], [1], head_dim=2, dims=[1], backend=backend)
    assert got[0].flatten().tolist() == [2, 3, 6, 7, 10, 11]


def test_gradients() -> None:
    leaves = [x.double().requires_grad_() for x in block()]
    got = kdfast.head_gather_block(leaves, [2, 1], head_dim=DIM, dims=DIMS)
    sum((y * (i + 1)).sum() for i, y in enumerate(got)).backward()
    for i, (x, dim) in enumerate(zip(leaves, DIMS, strict=True)):
        assert x.grad is not None
        by_head = x.grad.movedim(dim, 0).unflatten(0, (HEADS, DIM))
        assert torch.equal(by_head[1:3], torch.full_like(by_head[1:3], i + 1.0))
        assert not by_head[0].any() and not by_head[3].any()


@pytest.mark.usefixtures("compiled")
def test_registration() -> None:
    torch.library.opcheck(
        torch.ops.kdfast.head_gather_block.default, (block(), [2, 0], DIM, [0, 0, 0, 0, 1, 2])
    )


def test_compile() -> None:
    def gather(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return kdfast.head_gather_block(tensors, [3, 0], head_dim=DIM, dims=DIMS)

    tensors = block()
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(*tensors), gather(*tensors), strict=True):
        assert torch.equal(x, y)


class Calls(TorchDispatchMode):
    """Names of the kdfast ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kdfast":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cuda" not in op.FUSED_ON, reason="built without CUDA")
def test_one_launch_on_cuda() -> None:
    with torch._subclasses.FakeTensorMode(), Calls() as calls:
        tensors = [torch.empty(x.shape, device="cuda:1") for x in block()]
        got = kdfast.head_gather_block(tensors, [3, 1], head_dim=DIM, dims=DIMS, backend="fused")
        assert calls.names == ["head_gather_block"]
        assert {y.device for y in got} == {torch.device("cuda", 1)}
        leaves = [x.requires_grad_() for x in tensors]
        kdfast.head_gather_block(leaves, [3, 1], head_dim=DIM, dims=DIMS)
        assert calls.names[1:] == ["head_gather"] * len(DIMS)


@pytest.mark.usefixtures("compiled")
def test_pruning_makes_one_call_for_each_block() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=2)
    with Calls() as calls:
        kdfast.prune_heads(model, [[0], [2, 1], [0, 2]])
    assert calls.names == ["head_gather_block"] * 3


def test_none() -> None:
    assert kdfast.head_gather_block([], [0], head_dim=2, dims=[]) == []


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"dims": [0]}, ValueError, "one dimension for each tensor, got 1 and 2 tensors"),
        ({"dims": [0, 2]}, ValueError, r"dims must be in \[-1, 1\) for all, got 2"),
        ({"head_dim": 5}, ValueError, "multiples of head_dim, got 24 and 5"),
        ({"heads": [4]}, ValueError, r"must be in \[0, 4\), got \[4\]"),
        ({"heads": [1, 1]}, ValueError, "must not repeat"),
        ({"heads": [0.5]}, TypeError, "must hold ints"),
        ({"tensors": [torch.ones(24), torch.ones(12)]}, ValueError, "all hold 4 heads on cpu"),
        ({"tensors": [torch.ones(24), torch.ones(24, device="meta")]}, ValueError, "got 4 on meta"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], match: str) -> None:
    call: dict[str, Any] = {"tensors": [torch.ones(24, 3), torch.ones(24)], "heads": [0]}
    call |= {"head_dim": 6, "dims": [0, 0], **change}
    tensors, heads = call.pop("tensors"), call.pop("heads")
    with pytest.raises(error, match=match):
        kdfast.head_gather_block(tensors, heads, **call)


def test_backend_choice() -> None:
    wide = torch.randn(op.one.MAX_HEADS + 1)
    with pytest.raises(NotImplementedError, match="more than 512 heads"):
        kdfast.head_gather_block([wide], [0], head_dim=1, dims=[0], backend="fused")
