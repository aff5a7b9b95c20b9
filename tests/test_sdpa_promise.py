# SPDX-License-Identifier: Apache-2.0
"""kdfast.scaled_dot_product_attention works where torch's works, and fails where and as it fails.

The calls are PyTorch's own samples of the function, and every kind of input that it is known to
take or to refuse.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import kdfast
from kdfast.ops import sdpa

OURS, TORCHS = kdfast.scaled_dot_product_attention, F.scaled_dot_product_attention
FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def qkv(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shape = shape or (2, 3, 8, 16)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3)]


def outcome(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result, or the type of the exception."""
    torch.manual_seed(7)
    try:
        return call(*args, **options)
    except Exception as error:
        assert "pruned_attention" not in str(error), error
        return type(error)


def same(ours: Any, torchs: Any) -> None:
    if not isinstance(torchs, Tensor) or not isinstance(ours, Tensor):
        assert ours is torchs, (ours, torchs)
    elif torchs.is_nested:
        for a, b in zip(ours.unbind(), torchs.unbind(), strict=True):
            torch.testing.assert_close(a, b)
    else:
        # Each side has rounded once.
        close = 2 * torch.finfo(torchs.dtype).eps if torchs.dtype in FLOATING[:2] else 1e-5
        torch.testing.assert_close(ours, torchs, rtol=close, atol=close, equal_nan=True)


def samples(dtype: torch.dtype, grad: bool) -> Iterator[Any]:
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    name = "nn.functional.scaled_dot_product_attention"
    (info,) = [op for op in methods.op_db if op.name == name]
    yield from info.sample_inputs("cpu", dtype, requires_grad=grad)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_samples_of_pytorch(dtype: torch.dtype) -> None:
    count = 0
    for count, sample in enumerate(samples(dtype, False), 1):  # noqa: B007
        args = (sample.input, *sample.args)
        same(outcome(OURS, *args, **sample.kwargs), outcome(TORCHS, *args, **sample.kwargs))
    assert count >= 20


def test_gradients_of_samples() -> None:
    for sample in samples(torch.float64, True):
        leaves = [sample.input, *sample.args]
        found = []
        for call in (OURS, TORCHS):
            torch.manual_seed(3)
            out = call(*leaves, **sample.kwargs)
            grads = torch.autograd.grad(out.sum(), leaves) if out.requires_grad else ()
            found.append([out, *grads])
        for a, b in zip(*found, strict=True):
            same(a, b)


@pytest.mark.parametrize("heads", [2, 3, 12])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_masks_without_data(heads: int, make: Callable[[int, int], Tensor]) -> None:
    """Their memory is not what they mean: a causal mask."""
    q, k, v = qkv(2, heads, 16, 8)
    mask = make(16, 16)
    assert torch.equal(OURS(q, k, v, mask), TORCHS(q, k, v, is_causal=True))
    with pytest.raises(NotImplementedError, match="take no mask of this kind"):
        OURS(q, k, v, mask, backend="fused")
    for backend in ("fused", "reference"):
        with pytest.raises(TypeError, match="bias must be a tensor with values of its own, got"):
            kdfast.pruned_attention(q, k, v, bias=mask, backend=backend)


class Logged(Tensor):
    """A subclass that only records what it is asked."""

    asked: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("place", range(4))
def test_subclasses_are_torchs(place: int) -> None:
    inputs = [*qkv(), torch.zeros(8, 8)]
    inputs[place] = inputs[place].as_subclass(Logged)
    Logged.asked.clear()
    got = OURS(*inputs)
    assert type(got) is Logged and TORCHS in Logged.asked
    same(got.as_subclass(Tensor), TORCHS(*(x.as_subclass(Tensor) for x in inputs)))


def test_parameters_are_fused(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = sdpa.pruned_attention
    monkeypatch.setattr(
        sdpa, "pruned_attention", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    inputs = [torch.nn.Parameter(x) for x in qkv()]
    same(OURS(*inputs, torch.nn.Parameter(torch.ones(8, 8))), TORCHS(*inputs))
    assert calls


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested(layout: torch.layout) -> None:
    def nested(seed: int) -> Tensor:
        parts = [qkv(n, 3, 16, seed=seed)[0] for n in (4, 7)]
        return torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)

    inputs = [nested(seed) for seed in range(3)]
    same(outcome(OURS, *inputs), outcome(TORCHS, *inputs))


Q, K, V = qkv()
MASK = torch.zeros(8, 8)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "one dtype of two": ((Q, K.bfloat16(), V), {}),
    "value of fp64": ((Q, K, V.double()), {}),
    "integers": ((Q.long(), K.long(), V.long()), {}),
    "complex": ((Q.cfloat(), K.cfloat(), V.cfloat()), {}),
    "bool": ((Q > 0, K > 0, V > 0), {}),
    "float8": (tuple(x.to(torch.float8_e4m3fn) for x in (Q, K, V)), {}),
    "meta": (tuple(x.to("meta") for x in (Q, K, V)), {}),
    "one on meta": ((Q, K.to("meta"), V), {}),
    "mask on meta": ((Q, K, V, MASK.to("meta")), {}),
    "one dimension": ((Q[0, 0, 0], K[0, 0, 0], V[0, 0, 0]), {}),
    "two dimensions": ((Q[0, 0], K[0, 0], V[0, 0]), {}),
    "five dimensions": ((Q[None], K[None], V[None]), {}),
    "no image": ((Q[:0], K[:0], V[:0]), {}),
    "no token": ((Q[:, :, :0], K[:, :, :0], V[:, :, :0]), {}),
    "no key": ((Q, K[:, :, :0], V[:, :, :0]), {}),
    "no channel": ((Q[..., :0], K[..., :0], V[..., :0]), {}),
    "no channel of a value": ((Q, K, V[..., :0]), {}),
    "other channels": ((Q, K[..., :8], V), {}),
    "other tokens of a value": ((Q, K, V[:, :, :4]), {}),
    "one image for all": ((Q, K[:1], V[:1]), {}),
    "grouped": ((Q, K[:, :1], V[:, :1]), {"enable_gqa": True}),
    "grouped badly": ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True}),
    "grouped without saying": ((Q, K[:, :2], V[:, :2]), {}),
    "gqa of equal heads": ((Q, K, V), {"enable_gqa": True}),
    "dropout": ((Q, K, V), {"dropout_p": 0.4}),
    "dropout of all": ((Q, K, V), {"dropout_p": 1.0}),
    "negative dropout": ((Q, K, V), {"dropout_p": -0.5}),
    "dropout above one": ((Q, K, V), {"dropout_p": 1.5}),
    "causal and mask": ((Q, K, V, MASK), {"is_causal": True}),
    "integer mask": ((Q, K, V, MASK.long()), {}),
    "mask of fp16": ((Q, K, V, MASK.half()), {}),
    "mask of fp64": ((Q, K, V, MASK.double()), {}),
    "mask of fp32 for bf16": ((Q.bfloat16(), K.bfloat16(), V.bfloat16(), MASK), {}),
    "mask of keys": ((Q, K, V, torch.arange(8.0)), {}),
    "mask of one number": ((Q, K, V, torch.ones(())), {}),
    "mask too long": ((Q, K, V, torch.zeros(8, 9)), {}),
    "mask of five dimensions": ((Q, K, V, torch.zeros(1, 1, 1, 8, 8)), {}),
    "empty mask": ((Q, K, V, torch.zeros(0, 8, 8)), {}),
    "mask of all": ((Q, K, V, torch.zeros(8, 8, dtype=torch.bool)), {}),
    "scale of an int": ((Q, K, V), {"scale": 2}),
    "scale 0": ((Q, K, V), {"scale": 0.0}),
    "infinite scale": ((Q, K, V), {"scale": float("inf")}),
    "scale that is none": ((Q, K, V), {"scale": float("nan")}),
    "scale of a string": ((Q, K, V), {"scale": "2"}),
    "sparse": ((Q.to_sparse(), K, V), {}),
    "causal": ((Q, K, V), {"is_causal": True}),
    "expanded": (tuple(x[:1].expand(4, 3, 8, 16) for x in (Q, K, V)), {}),
    "mask of heads": ((Q, K, V, torch.randn(3, 8, 8, generator=torch.Generator())), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_outcome_is_torchs(name: str) -> None:
    args, options = CALLS[name]
    same(outcome(OURS, *args, **options), outcome(TORCHS, *args, **options))


def test_no_heads() -> None:
    """Not held against torch's function, which ends the process before torch 2.12."""
    q, k, v = (x[:, :0].requires_grad_() for x in qkv())
    for options in ({}, {"is_causal": True}):
        out = OURS(q, k, v, **options)
        assert out.shape == (2, 0, 8, 16) and out.requires_grad
        out.sum().backward()
        assert q.grad is not None and q.grad.shape == q.shape


def test_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for args in ((Q, K, V), (Q, K.bfloat16(), V), (Q, K, V, MASK)):
            ours, torchs = OURS(*args), TORCHS(*args)
            assert ours.dtype == torchs.dtype
            torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], ids=str)
def test_a_choice_of_torchs_kernels_is_kept(backend: SDPBackend) -> None:
    with sdpa_kernel(backend):
        same(outcome(OURS, Q, K, V), outcome(TORCHS, Q, K, V))
        if backend == SDPBackend.MATH:
            assert torch.equal(OURS(Q, K, V), TORCHS(Q, K, V))
            assert torch.equal(sdpa.self_attention(Q, K, V), TORCHS(Q, K, V))


def test_math_has_second_derivatives() -> None:
    inputs = [x[:1, :1, :3, :4].double().requires_grad_() for x in (Q, K, V)]
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(OURS, inputs)


def test_compiled_graph_has_no_break(compiled: None) -> None:
    call = torch.compile(OURS, fullgraph=True, backend="aot_eager")
    same(call(Q, K, V), TORCHS(Q, K, V))
    same(call(Q, K, V, MASK), TORCHS(Q, K, V, MASK))
