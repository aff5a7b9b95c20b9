# SPDX-License-Identifier: Apache-2.0
"""Every op under every transform of the table in docs/use/tracing.md, and models under some."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import kdfast
from kdfast.ops.attention_entropy import attention_entropy
from kdfast.ops.geometry import Rope, Window
from kdfast.testing import rotary

PAGE = Path(__file__).parents[1] / "docs" / "use" / "tracing.md"
Op = Callable[..., Tensor]
B, H, N, D = 2, 3, 9, 4

torch.manual_seed(0)
_f64 = {"dtype": torch.float64}
Q, K, V, TQ, TK = (torch.randn(B, H, N, D, **_f64) for _ in range(5))
BIAS, PAD = torch.randn(1, H, N, N, **_f64), torch.randn(H, D, **_f64)
S, T, Y = torch.randn(6, 7, **_f64), torch.randn(6, 7, **_f64), torch.randint(0, 7, (6,))
HIDDEN, CLASSES = torch.randn(6, 4, **_f64), torch.randn(7, 4, **_f64)
GATE, VALUE = torch.randn(6, 8, **_f64), torch.randn(6, 8, **_f64)
GAIN, SHIFT = torch.rand(6, **_f64), torch.randn(6, **_f64)
ROWS, WEIGHT = torch.randn(5, 12, **_f64), torch.randn(7, 12, **_f64)


def _rope(tokens: int) -> Rope:
    made = rotary(tokens, D)
    return Rope(made.cos.double(), made.sin.double())


# By name the public op, a call of it with one varying tensor, and that tensor.
OPS: dict[str, tuple[str, Op, Tensor]] = {
    "attention": (
        "pruned_attention",
        lambda x, b=None: kdfast.pruned_attention(x, K, V, heads=[2, 0], rope=_rope(N), backend=b),
        Q,
    ),
    "self-attention": (
        "pruned_attention",
        lambda x, b=None: kdfast.pruned_attention(x, x, x, backend=b),
        Q,
    ),
    "bias": (
        "pruned_attention",
        lambda x, b=None: kdfast.pruned_attention(x, K, V, bias=BIAS * x.sum(), backend=b),
        Q,
    ),
    "window": (
        "pruned_attention",
        lambda x, b=None: kdfast.pruned_attention(
            x, K, V, rope=_rope(4), window=Window((3, 3), 2, PAD * x.mean()), backend=b
        ),
        Q,
    ),
    "sdpa": (
        "scaled_dot_product_attention",
        lambda x, b=None: kdfast.scaled_dot_product_attention(x, K, V, BIAS, backend=b),
        Q,
    ),
    "distill": (
        "attention_distill",
        lambda x, b=None: kdfast.attention_distill(x, K, V, TQ, TK, backend=b)[1],
        Q,
    ),
    "distill window": (
        "attention_distill",
        lambda x, b=None: kdfast.attention_distill(
            x, K, V, TQ, TK, window=Window((3, 3), 2, PAD), rope=_rope(4), backend=b
        )[0],
        Q,
    ),
    "distill logits": (
        "attention_distill",
        lambda x, b=None: kdfast.attention_distill(x, K, V, TQ, TK, kind="logit_mse", backend=b)[1],
        Q,
    ),
    "entropy": ("attention_entropy", lambda x, b=None: attention_entropy(x, K, backend=b)[0], Q),
    "kd": ("kd_loss", lambda x, b=None: kdfast.kd_loss(x, T, Y, backend=b)[0], S),
    "linear kd": (
        "linear_kd_loss",
        lambda x, b=None: kdfast.linear_kd_loss(x, CLASSES, T, Y, backend=b)[0],
        HIDDEN,
    ),
    "feature": (
        "feature_loss",
        lambda x, b=None: kdfast.feature_loss(x, T, kind="cosine", normalize="layer", backend=b),
        S,
    ),
    "swiglu": (
        "swiglu_norm",
        lambda x, b=None: kdfast.swiglu_norm(x, VALUE, GAIN, SHIFT, backend=b),
        GATE,
    ),
    "gather": (
        "head_gather",
        lambda x, b=None: kdfast.head_gather(x, [2, 0], head_dim=4, dim=1, backend=b),
        ROWS,
    ),
    "gather block": (
        "head_gather_block",
        lambda x, b=None: kdfast.head_gather_block(
            [x, x + 1], [2, 0], head_dim=4, dims=[1, 1], backend=b
        )[1],
        ROWS,
    ),
    "linear": ("linear", lambda x, b=None: kdfast.linear(x, WEIGHT), ROWS),
}


class Named(Tensor):
    """A subclass that torch's functions see, and nothing more."""


class Wrapper(Tensor):
    """A tensor without data of its own, whose operators run on another one."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def inner(x: Any) -> Any:
            return x.held if isinstance(x, Wrapper) else x

        out = op(*pytree.tree_map(inner, args), **pytree.tree_map(inner, kwargs or {}))
        return pytree.tree_map(lambda x: Wrapper(x) if isinstance(x, Tensor) else x, out)


def pulled_back(op: Op, x: Tensor) -> Tensor:
    out, back = vjp(op, x)
    return back(torch.ones_like(out))[0]


def tangent(op: Op, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(op(forward_ad.make_dual(x, x.cos())))
        assert out.tangent is not None, "the tangent was dropped"
        return out.tangent


def gradient(op: Op, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = op(x)
    if not out.requires_grad:  # the entropy of heads has no gradient
        return out
    return torch.autograd.grad((out * out.detach().cos()).sum(), x)[0]


def twice(op: Op, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    if not op(x).requires_grad:
        return op(x)
    (first,) = torch.autograd.grad((op(x) ** 3).sum(), x, create_graph=True)
    return torch.autograd.grad(first.sin().sum(), x)[0]


def traced(op: Op, x: Tensor) -> Tensor:
    found = torch.jit.trace(op, (x,), check_trace=False)
    assert "kdfast::" not in str(found.graph)
    return found(x + 1)


def exported(op: Op, x: Tensor) -> Tensor:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(x)

    program = torch.export.export(Whole(), (x,))
    assert not any("kdfast" in str(node.target) for node in program.graph.nodes)
    return program.module()(x + 1)


def compiled(op: Op, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    run = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    return gradient(run, x)


def fake(op: Op, x: Tensor) -> Tensor:
    """Zeros of the shape that a call with fake tensors has."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        shape = op(mode.from_tensor(x)).shape
    return torch.zeros(shape)


def meta(op: Op, x: Tensor) -> Tensor:
    """Zeros of the shape that a call has whose tensors are all on the meta device."""
    tensors = {name: value for name, value in globals().items() if isinstance(value, Tensor)}
    globals().update({name: value.to("meta") for name, value in tensors.items()})
    try:
        with torch.device("meta"):
            return torch.zeros(op(x.to("meta")).shape, device="cpu")
    finally:
        globals().update(tensors)


Transform = Callable[[Op, Tensor], Any]
# By the words of the page: the transform, and what it has to give on the reference.
TRANSFORMS: dict[str, list[tuple[Transform, Transform | None]]] = {
    "`torch.func.grad`, `vjp`, `jacrev`": [
        (lambda op, x: grad(lambda z: (op(z) ** 2).sum())(x), None),
        (pulled_back, None),
        (lambda op, x: jacrev(op)(x), None),
    ],
    "`torch.func.jvp`, `jacfwd`, `autograd.forward_ad`": [
        (lambda op, x: jvp(op, (x,), (x.cos(),))[1], None),
        (lambda op, x: jacfwd(op)(x), None),
        (tangent, None),
    ],
    "`torch.func.vmap`, per-sample gradients": [
        (lambda op, x: vmap(op)(torch.stack([x, x.sin()])), None),
        (
            lambda op, x: vmap(grad(lambda z: (op(z) ** 2).sum()))(torch.stack([x, x.sin()])),
            None,
        ),
    ],
    "`torch.func.hessian`": [(lambda op, x: hessian(lambda z: op(z).sum())(x), None)],
    "double backward": [(twice, None)],
    "`torch.jit.trace`": [(traced, lambda op, x: op(x + 1))],
    "`torch.export`": [(exported, lambda op, x: op(x + 1))],
    "`torch.compile`, fullgraph, dynamic": [(compiled, gradient)],
    "subclass by `__torch_function__`": [
        (lambda op, x: op(x.as_subclass(Named)).as_subclass(Tensor), lambda op, x: op(x))
    ],
    "subclass by `__torch_dispatch__`": [
        (lambda op, x: op(Wrapper(x)).held, lambda op, x: op(x)),
    ],
    "fake tensors": [(fake, lambda op, x: torch.zeros(op(x).shape))],
    "meta tensors": [(meta, lambda op, x: torch.zeros(op(x).shape))],
}
# A minute and more for all ops, each in a graph of its own.
LONG = ("`torch.export`", "`torch.compile`, fullgraph, dynamic", "`torch.func.hessian`")


def documented() -> dict[str, tuple[str, list[str]]]:
    """Rows of the page: transform -> whose code runs, and ops that raise."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return {name: (by, re.findall(r"`(\w+)`", errors)) for name, by, errors in rows[2:]}


def test_the_page_has_every_transform() -> None:
    assert set(documented()) == set(TRANSFORMS)


@pytest.mark.parametrize(
    ("transform", "op"),
    [
        pytest.param(name, op, marks=[pytest.mark.slow] if name in LONG and at % 4 else [])
        for name in TRANSFORMS
        for at, op in enumerate(OPS)
    ],
)
def test_ops(transform: str, op: str) -> None:
    public, call, x = OPS[op]
    raises = public in documented()[transform][1]
    for apply, wanted in TRANSFORMS[transform]:
        if raises:
            with pytest.raises(NotImplementedError, match="backend='reference'"):
                apply(call, x)
            continue
        want = (wanted or apply)(lambda z: call(z, "reference"), x)
        torch.testing.assert_close(apply(call, x), want, atol=1e-8, rtol=1e-7)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_whose_code_runs(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by, _ = documented()[transform]
    decisions: list[bool] = []
    file = sys.modules["kdfast.ops.swiglu_norm"]
    real = file.use_fused

    def spy(*args: Any, **kwargs: Any) -> bool:
        decisions.append(real(*args, **kwargs))
        return decisions[-1]

    monkeypatch.setattr(file, "use_fused", spy)
    _, call, x = OPS["swiglu"]
    for apply, _ in TRANSFORMS[transform]:
        decisions.clear()
        if transform.startswith("`torch.compile`"):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                monkeypatch.undo()
                apply(call, x)
            decisions = [any(e.name == "kdfast::swiglu_norm" for e in seen.events())]
        else:
            apply(call, x)
        # The kernel's own result is differentiated again by torch's operators.
        kernels = by == "kernels" or transform == "double backward"
        assert decisions and set(decisions) == {kernels}


def test_the_fused_backend_cannot_be_asked_for() -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match="fused|reference"):
        jvp(lambda x: kdfast.pruned_attention(x, K, V, backend="fused"), (Q,), (Q,))


MODELS = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224")


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"num_classes": 3, "img_size": 32}
    if name.startswith("swin"):
        arguments |= {"img_size": 56, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)}
        arguments["window_size"] = 7
    else:
        arguments |= {"depth": 1, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model(name, **arguments).eval().double()
    other = timm.create_model(name, **arguments).eval().double()
    other.load_state_dict(model.state_dict())
    kdfast.accelerate(other)
    return model, other, torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, fused, x = pair(name)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(of: nn.Module, values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(of, values, (image[None],)).square().sum()

    def per_sample(of: nn.Module) -> dict[str, Tensor]:
        # A call in inference first: packed weights must not stand in for these.
        with torch.no_grad():
            of(x)
        changed = {key: value * 1.5 for key, value in parameters.items()}
        return vmap(grad(lambda v, i: loss(of, v, i)), in_dims=(None, 0))(changed, x)

    close = {"atol": 1e-8, "rtol": 1e-6}
    for key, want in per_sample(model).items():
        torch.testing.assert_close(per_sample(fused)[key], want, **close)
    # Torch's fused attention has no forward mode of its own.
    with sdpa_kernel(SDPBackend.MATH):
        want, got = (jvp(m, (x,), (x.cos(),)) for m in (model, fused))
    for one, other in zip(want, got, strict=True):
        torch.testing.assert_close(other, one, **close)
    found = torch.jit.trace(fused, (x,), check_trace=False)
    torch.testing.assert_close(found(x.sin()), model(x.sin()), **close)
