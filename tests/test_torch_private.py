# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that kdfast uses does what kdfast counts on, and is in one file."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from kdfast.ops import _torch_private as private

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "kdfast" / "ops" / "_torch_private.py"
# Dictionaries of modules and what subclasses of them override, of which the file speaks.
OF_MODULES = set(vars(nn.Module())) | {"_apply"}
onednn = pytest.mark.skipif(private.linear_pointwise is None, reason="this torch has no oneDNN")


def test_has_kernel() -> None:
    assert private.has_kernel("aten::add.Tensor", "CPU")
    assert not private.has_kernel("kdfast::kd_loss", "XPU")


def test_any_requires_grad() -> None:
    x, weight = torch.ones(2), torch.ones(2, requires_grad=True)
    assert private.any_requires_grad(x, None, 3, weight)
    assert private.any_requires_grad([x, weight])
    assert not private.any_requires_grad(x, None, "mean", [x])


def test_below_autograd() -> None:
    weight = torch.ones(2, requires_grad=True)
    with private.BelowAutograd():
        assert not torch.mul(weight, 2).requires_grad
    assert torch.mul(weight, 2).requires_grad


def test_after_autograd() -> None:
    """An op's autograd kernel calls what comes after it, with the keys of its own call."""
    seen: list[bool] = []
    library = torch.library.Library("kdfast_private", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    op = torch.ops.kdfast_private.twice.default

    def autograd(keyset: Any, x: Tensor) -> Tensor:
        with private.BelowAutograd():
            out: Tensor = op.redispatch(keyset & private.AFTER_AUTOGRAD, x)
        return out

    library.impl("twice", lambda x: seen.append(x.requires_grad) or x * 2, "CPU")
    library.impl("twice", autograd, "Autograd", with_keyset=True)
    assert op(torch.ones(2, requires_grad=True)).tolist() == [2, 2] and seen == [True]


class _Calls(private.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes() -> None:
    x = torch.ones(2)
    assert private.dispatch_modes() == 0
    with _Calls() as calls:
        assert private.dispatch_modes() == 1
        x.exp()
    assert calls.names == ["aten.exp"]


def test_graph_is_kept() -> None:
    x = torch.ones(2, requires_grad=True)
    y = (x * x).sum()
    seen: list[bool] = []
    x.register_hook(lambda grad: seen.append(private.graph_is_kept()))
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]


def test_functorch_and_what_it_wraps() -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append((private.functorch_active(), private.is_wrapped(x), private.is_batched(x)))
        return x.sum()

    f(torch.ones(2))
    torch.func.vmap(f)(torch.ones(3, 2))
    torch.func.grad(f)(torch.ones(2))
    assert seen == [(False, False, False), (True, True, True), (True, True, False)]


def test_is_legacy_batched() -> None:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(private.is_legacy_batched(grad)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    # torch.autograd takes either vmap; kdfast asks for both.
    assert seen[1] is False and isinstance(seen[0], bool)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_tracing_state() -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(private.tracing_state() is None)
        return x + 1

    f(torch.ones(2))
    torch.jit.trace(f, torch.ones(2), check_trace=False)
    assert seen == [True, False]


@pytest.mark.parametrize("strict", [False, True])
def test_exporting(strict: bool) -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if private.exporting() else x - 1

    x = torch.zeros(2)
    assert torch.compile(Asks(), fullgraph=True, backend="eager")(x)[0] == -1
    assert torch.export.export(Asks(), (x,), strict=strict).module()(x)[0] == 1
    assert not private.exporting()


@onednn
@pytest.mark.parametrize("packed", [False, True])
def test_linear_pointwise(packed: bool) -> None:
    x, weight, bias = torch.randn(5, 6, 8), torch.randn(7, 8), torch.randn(7)
    other = torch.randn(5, 6, 7)
    given = private.reorder_linear_weight(weight, None) if packed else weight
    plain = F.linear(x, weight, bias)
    for name, algorithm, after in (
        ("none", "", plain),
        ("relu", "", plain.relu()),
        ("gelu", "none", F.gelu(plain)),
        ("gelu", "tanh", F.gelu(plain, approximate="tanh")),
        ("swish", "", F.silu(plain)),
    ):
        got = private.linear_pointwise.default(x, given, bias, name, [], algorithm)
        torch.testing.assert_close(got, after, rtol=1e-4, atol=1e-4)
    for name, after in (("add", plain + other), ("mul", plain * other)):
        got = private.linear_pointwise.binary(x, other, given, bias, name)
        torch.testing.assert_close(got, after, rtol=1e-4, atol=1e-4)


@onednn
def test_multiplies_half() -> None:
    assert isinstance(private.multiplies_bf16(), bool)
    assert isinstance(private.multiplies_fp16(), bool)


def test_flash_attention() -> None:
    """What runs on a CPU is a key, and torch counts its work by the name in the value."""
    q = torch.ones(1, 2, 8, 16, requires_grad=True)
    with _Calls() as calls:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    keys = {str(packet): packet for packet in private.FLASH_ATTENTION}
    ran = [keys[name] for name in calls.names if name in keys]
    assert ran == list(private.FLASH_ATTENTION)
    for cpu, gpu in private.FLASH_ATTENTION.items():
        assert gpu in flop_registry
        names = [[x.name for x in private.schema_arguments(op.default)] for op in (cpu, gpu)]
        assert names[0][:3] == names[1][:3]


def test_forward_level() -> None:
    assert private.forward_level() == -1
    with forward_ad.dual_level():
        assert private.forward_level() == 0
    assert private.forward_level() == -1


def test_is_compiled() -> None:
    module = nn.Linear(2, 2)
    assert not private.is_compiled(module)
    module.compile(backend="eager")
    assert private.is_compiled(module)


def test_schema_arguments() -> None:
    x, dim = private.schema_arguments(torch.ops.aten.select.int)[:2]
    assert (x.name, str(x.type), x.has_default_value()) == ("self", "Tensor", False)
    assert (dim.name, str(dim.type)) == ("dim", "int")


def test_storage_key() -> None:
    x, empty = torch.ones(4), torch.ones(0)
    assert private.storage_key(x) == private.storage_key(x[1:].view(3, 1))
    assert private.storage_key(empty) != private.storage_key(torch.ones(0))


def test_version() -> None:
    x = torch.ones(4)
    before = private.version(x)
    x[1:].mul_(2)
    assert private.version(x) > before


def test_inductor_config() -> None:
    before = private.inductor_config().freezing
    with private.inductor_config().patch(freezing=not before):
        assert private.inductor_config().freezing is not before
    assert private.inductor_config().freezing is before


def test_fake_tensors() -> None:
    with private.FakeTensorMode():
        x = torch.empty(1 << 20, 1 << 20)
        assert type(x) is private.FakeTensor and type(x @ x) is private.FakeTensor


def test_functional_tensor() -> None:
    """``torch.compile`` hands these to an op's gradient."""
    seen = set()

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.add(type(grad))
            return grad * 2

    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.compilers import nop

    x = torch.ones(2, requires_grad=True)
    aot_function(Double.apply, nop)(x).sum().backward()
    assert private.FunctionalTensor in seen


def test_tree_leaves() -> None:
    assert private.tree_leaves([1, (2, {"a": 3}), None]) == [1, 2, 3, None]


def test_any_global_hook() -> None:
    assert not private.any_global_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert private.any_global_hook()
    handle.remove()
    assert not private.any_global_hook()


def test_current_function_mode() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    assert private.current_function_mode() is None
    with Mode() as mode:
        assert private.current_function_mode() is mode


def test_every_name_is_tried() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    tried = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "private"
    }
    assert tried - {"__all__"} == set(private.__all__)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(text: str) -> Iterator[str]:
    """Private names of torch in a file, as far as its text alone tells."""
    tree = ast.parse(text)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = {a.asname or a.name.split(".")[0]: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        else:
            continue
        known |= {k: v for k, v in found.items() if v.split(".")[0] == "torch"}
    # An assigned name stands for what it was assigned.
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], dotted(node.value)
            root = value.split(".")[0]
            if isinstance(target, ast.Name) and "." in value and root in known:
                known.setdefault(target.id, value.replace(root, known[root], 1))
    yield from (name for name in known.values() if any(map(is_private, name.split("."))))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = dotted(node).split(".")[0]
            ours = root in ("self", "cls", "kdfast")
            if root in known or (not ours and of_torch(node.attr)):
                yield dotted(node)
        if isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr"):
            given = [x.value for x in node.args[1:] if isinstance(x, ast.Constant)]
            yield from (str(x) for x in given if of_torch(str(x)))


def dotted(node: ast.expr) -> str:
    """ "a.b.c" of an expression like that; an empty first part where it starts otherwise."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def of_torch(name: str) -> bool:
    """Whether a name is a private one of torch's tensors, storages, modules or operators."""
    holders = (torch, torch._C, Tensor, nn.Module, nn.MultiheadAttention(4, 1))
    holders += (torch.UntypedStorage, torch.ops.aten.add, torch.ops.aten.add.Tensor)
    return is_private(name) and name not in OF_MODULES and any(hasattr(x, name) for x in holders)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "import torch\ntorch._C._get_tracing_state()",
            {"torch._C", "torch._C._get_tracing_state"},
        ),
        ("from torch._subclasses import FakeTensorMode", {"torch._subclasses.FakeTensorMode"}),
        ("import torch\nops = torch.ops.mkldnn\nops._linear_pointwise", {"ops._linear_pointwise"}),
        ("def f(x):\n    return x._version, x.untyped_storage()._cdata", {"x._version", "._cdata"}),
        ("def f(op):\n    return getattr(op, '_schema')", {"_schema"}),
        ("import torch\ntorch.nn.Linear(2, 2)._parameters", set()),
        ("import timm._x\nself._version = row._replace(a=1)", set()),
    ],
)
def test_private_names_are_seen(text: str, found: set[str]) -> None:
    assert set(private_names(text)) == found


def test_no_other_file_uses_private_names() -> None:
    files = [*(ROOT / "kdfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert HOME in files
    found = {
        str(file.relative_to(ROOT)): names
        for file in files
        if file != HOME and (names := sorted(set(private_names(file.read_text("utf-8")))))
    }
    assert not found
