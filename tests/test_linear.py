# SPDX-License-Identifier: Apache-2.0
"""kdfast.linear against F.linear: values, gradients, and everything that must see torch's own."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from kdfast.ops import _matmul
from kdfast.ops._matmul import Choice, rule
from kdfast.ops._processor import identify
from kdfast.testing import assert_no_worse, run

# Not the public function's module: that one has the function's name in the package.
module = sys.modules["kdfast.ops.linear"]
linear = module.linear
ALL = Choice(True, True, True, True, True, "as the test wants it")


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN takes every product of fp32 and bf16, however small; the shapes of those it took."""
    if not _matmul._available():
        pytest.skip("this torch has no oneDNN")
    seen: list[tuple[int, ...]] = []
    real = _matmul.product

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = real(x, weight, bias)
        seen.append(tuple(out.shape))
        return out

    monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(module, "LEAST_WORK", 1)
    dtypes = (torch.float32, torch.bfloat16)
    monkeypatch.setattr(module, "SUPPORTED", frozenset(dtypes))
    monkeypatch.setattr(_matmul, "CHOICES", dict.fromkeys(dtypes, ALL))
    return seen


def inputs(*lead: int, c: int = 19, p: int = 23, bias: bool = True) -> list[Tensor]:
    """x, weight and bias in fp64."""
    shapes = [(*lead, c), (p, c), *([(p,)] if bias else [])]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


SHAPES = [
    ((5,), {}), ((), {}), ((1,), {}), ((2, 3, 7), {}), ((33,), {"bias": False}),
    ((40,), {"c": 7, "p": 200}), ((40,), {"c": 200, "p": 7}), ((6,), {"c": 1, "p": 1}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lead", "options"), SHAPES, ids=str)
def test_values_and_gradients(
    lead: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, products: list[Any]
) -> None:
    given = inputs(*lead, **options)
    exact, low = run(F.linear, given), [x.to(dtype) for x in given]
    got = run(linear, low)
    assert len(products) == 3  # the output and both gradients
    names = ("out", "x", "weight", "bias")[: len(got)]
    for name, *triple in zip(names, got, exact, run(F.linear, low), strict=True):
        assert_no_worse(f"{name} {dtype}", *triple)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_torchs_own(dtype: torch.dtype, products: list[Any]) -> None:
    given = [x.to(dtype) for x in inputs(5)]
    for one, other in zip(run(linear, given), run(F.linear, given), strict=True):
        assert torch.equal(one, other)
    assert not products


STRIDES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "transposed": lambda x, w: (x.transpose(0, 1).contiguous().transpose(0, 1), w.t().clone().t()),
    "sliced": lambda x, w: (F.pad(x, (3, 2))[..., 3:-2], F.pad(w, (1, 4))[:, 1:-4]),
    "steps": lambda x, w: (
        x.repeat_interleave(2, -1)[..., ::2], w.repeat_interleave(3, 0)[::3]
    ),
    "expanded rows": lambda x, w: (x[:1].expand(4, -1, -1), w),
    "one number": lambda x, w: (x[:1, :1, :1].expand(4, 6, 19), w[:1, :1].expand(23, 19)),
    "tokens behind the first": lambda x, w: (x[:, 1:], w),
    "offset": lambda x, w: (x.flatten()[1:-18].view(-1, 19), w.flatten()[19:].view(-1, 19)),
}  # fmt: skip


@pytest.mark.parametrize("how", STRIDES)
def test_strides(how: str, products: list[Any]) -> None:
    x, weight, bias = (t.float() for t in inputs(4, 6))
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def both(function: Any, dtype: torch.dtype) -> list[Tensor]:
        cast = [t.to(dtype) for t in leaves]
        a, b = STRIDES[how](cast[0], cast[1])
        out = function(a, b, cast[2][: len(b)])
        draw = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [out, *torch.autograd.grad(out, leaves, draw)]

    got = both(linear, torch.float32)
    assert products
    want = [t.double() for t in both(F.linear, torch.float64)]
    for triple in zip(got, want, both(F.linear, torch.float32), strict=True):
        assert_no_worse(how, *triple)


@pytest.mark.parametrize(
    ("lead", "c", "p"), [((0,), 4, 5), ((3,), 0, 5), ((3,), 4, 0), ((2, 0), 4, 5)]
)
def test_nothing_to_multiply(lead: tuple[int, ...], c: int, p: int) -> None:
    given = [x.float() for x in inputs(*lead, c=c, p=p)]
    for one, other in zip(run(linear, given), run(F.linear, given), strict=True):
        assert torch.equal(one, other)


WRONG: dict[str, Callable[[], Any]] = {
    "width": lambda: (torch.ones(3, 4), torch.ones(5, 6)),
    "bias": lambda: (torch.ones(3, 4), torch.ones(5, 4), torch.ones(6)),
    "dtype": lambda: (torch.ones(3, 4), torch.ones(5, 4).double()),
    "dtype of the bias": lambda: (torch.ones(3, 4), torch.ones(5, 4), torch.ones(5).bfloat16()),
    "number": lambda: (torch.tensor(1.0), torch.ones(5, 4)),
    "weight of three dimensions": lambda: (torch.ones(3, 4), torch.ones(2, 5, 4)),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_are_torchs(what: str) -> None:
    given = WRONG[what]()
    with pytest.raises(Exception) as theirs:
        F.linear(*given)
    with pytest.raises(type(theirs.value)) as ours:
        linear(*given)
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


OWN: dict[str, Callable[[], Any]] = {
    "a weight of one dimension": lambda: (torch.randn(3, 4), torch.randn(4)),
    "a sparse weight": lambda: (torch.randn(3, 4), torch.randn(5, 4).to_sparse_csr()),
    "oneDNN's layout": lambda: (torch.randn(3, 4).to_mkldnn(), torch.randn(5, 4).to_mkldnn()),
    "integers": lambda: (torch.ones(3, 4).long(), torch.ones(5, 4).long()),
    "complex numbers": lambda: (torch.randn(3, 4).cfloat(), torch.randn(5, 4).cfloat()),
    "meta": lambda: (torch.randn(3, 4, device="meta"), torch.randn(5, 4, device="meta")),
    "nested": lambda: (
        torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)]), torch.randn(5, 4)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(prototype|beta) (stage|state)")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("what", OWN)
def test_left_to_torch(what: str, autocast: bool, products: list[Any]) -> None:
    given = OWN[what]()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            want = F.linear(*given)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                linear(*given)
        else:
            got = linear(*given)
            assert (got.dtype, got.layout, got.device) == (want.dtype, want.layout, want.device)
            if what not in ("meta", "nested"):
                torch.testing.assert_close(got.to_dense(), want.to_dense())
    assert not products


def test_second_derivatives() -> None:
    given = [x.float() for x in inputs(3, 4)]
    draw = torch.randn(3, 4, 23)

    def penalty(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in given]
        out = function(*leaves)
        first = torch.autograd.grad((out.sin() * draw).sum(), leaves, create_graph=True)
        total = sum((g.square().sum() for g in first), torch.zeros(()))
        return list(torch.autograd.grad(total, leaves))

    exact, eager = penalty(F.linear, torch.float64), penalty(F.linear, torch.float32)
    found = zip(("x", "weight", "bias"), penalty(linear, torch.float32), exact, eager, strict=True)
    for name, *values in found:
        assert_no_worse(name, *values)


@pytest.mark.parametrize("needed", range(3))
def test_one_gradient_alone(needed: int, products: list[Any]) -> None:
    leaves = [x.float() for x in inputs(4)]
    leaves[needed].requires_grad_()
    got = torch.autograd.grad(linear(*leaves).sin().sum(), leaves[needed])[0]
    assert len(products) == (2 if needed < 2 else 1)
    want = torch.autograd.grad(F.linear(*leaves).sin().sum(), leaves[needed])[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside: bool, products: list[Any]) -> None:
    given = [x.float() for x in inputs(8)]

    def step(function: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*leaves)
            assert out.dtype == torch.bfloat16
            if backward_inside:
                out.float().sin().sum().backward()
        if not backward_inside:
            out.float().sin().sum().backward()
        return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    got, want = step(linear), step(F.linear)
    assert len(products) == 3
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_fp64_is_not_cast_by_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*inputs(3)).dtype == torch.float64


def test_func_transforms() -> None:
    x, weight, bias = (t.float() for t in inputs(6))

    def loss(function: Any) -> Callable[[Tensor], Tensor]:
        return lambda w: function(x, w, bias).sin().sum()

    transforms: list[Callable[[Any], Any]] = [
        lambda f: torch.func.grad(loss(f))(weight),
        lambda f: torch.func.vjp(lambda w: f(x, w), weight)[1](torch.ones(6, 23))[0],
        lambda f: torch.func.jvp(lambda w: f(x, w), (weight,), (weight.cos(),))[1],
        lambda f: torch.func.vmap(lambda row: f(row, weight, bias))(x),
        lambda f: torch.func.jacrev(lambda row: f(row, weight))(x[0]),
        lambda f: torch.func.hessian(loss(f))(weight)[0, 0],
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(linear), transform(F.linear))


@pytest.mark.parametrize("needed", [(0,), (1,), (0, 1, 2)], ids=str)
def test_gradients_of_several_outputs_at_once(needed: tuple[int, ...]) -> None:
    given = [x.float() for x in inputs(2, 3)]
    draws = torch.randn(4, 2, 3, 23)

    def grads(function: Any) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(i in needed) for i, x in enumerate(given)]
        wanted = [leaves[i] for i in needed]
        return torch.autograd.grad(function(*leaves), wanted, draws, is_grads_batched=True)

    for one, other in zip(grads(linear), grads(F.linear), strict=True):
        torch.testing.assert_close(one, other)


def test_forward_mode() -> None:
    x, weight, bias = (t.float() for t in inputs(6))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(linear(dual, weight, bias)).tangent
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), weight))


def test_compile(products: list[Any]) -> None:
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9):
        given = [x.float() for x in inputs(rows)]
        for one, other in zip(run(compiled, given), run(F.linear, given), strict=True):
            torch.testing.assert_close(one, other)
    assert (9, 23) in products and (9, 19) in products  # forward and backward in the graph


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(19, 23)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.inner.weight, self.inner.bias)


def test_exports_and_traces_hold_torchs_own() -> None:
    layer, x = Layer(), torch.randn(5, 19)
    want = layer(x)
    program = torch.export.export(layer, (x,))
    assert "kdfast" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), want)
    traced = torch.jit.trace(layer, (x,))
    assert not any(f"{ns}::" in str(traced.graph) for ns in ("kdfast", "mkldnn"))
    torch.testing.assert_close(traced(x), want)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), want)


@pytest.mark.parametrize("where", ["both", "backward"])
def test_flops_are_counted(where: str) -> None:
    def count(function: Any) -> int:
        leaves = [x.float().requires_grad_() for x in inputs(6)]
        with FlopCounterMode(display=False) as counter:
            if where == "both":
                function(*leaves).sum().backward()
        if where == "backward":
            out = function(*leaves).sum()
            with FlopCounterMode(display=False) as counter:
                out.backward()
        return counter.get_total_flops()

    assert count(linear) == count(F.linear) > 0


class Tagged(Tensor):
    pass


def test_subclasses_stay() -> None:
    x, weight, bias = (t.float() for t in inputs(6))
    assert type(linear(x.as_subclass(Tagged), weight, bias)) is Tagged
    assert type(linear(x, nn.Parameter(weight.as_subclass(Tagged)), bias)) is Tagged


def test_opcheck() -> None:
    for given in ([x.float() for x in inputs(6)], [x.float() for x in inputs(2, 3, bias=False)]):
        leaves = [x.requires_grad_() for x in given] + [None] * (3 - len(given))
        torch.library.opcheck(torch.ops.kdfast.linear.default, leaves)


@pytest.mark.usefixtures("precision")
def test_torchs_settings_keep_their_meaning(products: list[Any]) -> None:
    given = [x.float() for x in inputs(6)]
    with torch.backends.mkldnn.flags(enabled=False):
        linear(*given)
    assert not products
    for wanted in ("medium", "high"):
        torch.set_float32_matmul_precision(wanted)
        linear(*given)
    assert not products
    torch.set_float32_matmul_precision("highest")
    linear(*given)
    assert len(products) == 1
    # The newer way to say it, after which the older one's getter raises.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    linear(*given)
    assert len(products) == 1
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    linear(*given)
    assert len(products) == 2


def test_small_products_are_torchs_own(
    products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_WORK", _matmul.LEAST_WORK)
    x, weight = torch.randn(64, 128), torch.randn(128, 128)
    linear(x, weight)
    assert len(products) == 1
    linear(x[1:], weight)
    assert len(products) == 1


MACHINES = {
    "Zen 4": identify("AuthenticAMD", 0x19, 0x11, 1),
    "Zen 5": identify("AuthenticAMD", 0x1A, 0x02, 1),
    "Sapphire Rapids": identify("GenuineIntel", 6, 0x8F, 8),
    "Neoverse V2": identify("Arm", 8, 0xD4F, 0),
}
# Forward, packed, input gradient, weight gradient, tall weight gradient.
TABLE = [
    ("Zen 4", torch.float32, "11110"), ("Zen 5", torch.float32, "11111"),
    ("Sapphire Rapids", torch.float32, "01000"), ("Neoverse V2", torch.float32, "01000"),
    ("Zen 4", torch.bfloat16, "01000"), ("Zen 5", torch.bfloat16, "01000"),
    ("Sapphire Rapids", torch.bfloat16, "01000"), ("Neoverse V2", torch.bfloat16, "01000"),
]  # fmt: skip


@pytest.mark.parametrize(("machine", "dtype", "want"), TABLE)
def test_rule(machine: str, dtype: torch.dtype, want: str) -> None:
    def flags(setting: str, supported: bool) -> str:
        chosen = rule(dtype, MACHINES[machine], setting, supported)
        assert chosen.reason
        return "".join(str(int(flag)) for flag in chosen[:5])

    assert MACHINES[machine].name == machine
    assert flags("auto", True) == want
    assert flags("onednn", True) == "11111"
    assert flags("torch", True) == "00000"
    for setting in _matmul.SETTINGS:
        assert flags(setting, False) == "00000"


@pytest.mark.parametrize("setting", ["auto", "onednn", "torch", "mkl"])
def test_setting(setting: str) -> None:
    code = "from kdfast.ops._matmul import CHOICES; import torch; print(CHOICES[torch.float32])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KDFAST_LINEAR": setting},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if setting == "mkl":
        assert result.returncode == 1
        want = "KDFAST_LINEAR: must be one of ('auto', 'onednn', 'torch'), got 'mkl'"
        assert want in result.stderr
        return
    assert result.returncode == 0, result.stderr
    if setting != "auto":
        assert f"KDFAST_LINEAR={setting}" in result.stdout
        assert f"forward={setting == 'onednn'}" in result.stdout
