# SPDX-License-Identifier: Apache-2.0
"""Blocks that run their own code, because something was changed in them or the call is special."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import kdfast

C, HEADS, B, N = 96, 6, 2, 64  # B * N * C * C is above LEAST_WORK
pytestmark = pytest.mark.usefixtures("ran")


def build(everything: bool = False) -> nn.Module:
    """A holder of timm's block, far from its initial values, in evaluation."""
    torch.manual_seed(4)
    options = {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "proj_drop": 0.1}
    options = {**options, "drop_path": 0.2} if everything else {}
    holder = nn.Sequential(Block(C, HEADS, qkv_bias=True, init_values=0.3, **options))
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return holder.eval()


def tokens() -> Tensor:
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def output(holder: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = holder(x)
    return out


Change = Callable[[Any], Any]


def hook(path: str, kind: str) -> Change:
    def change(block: Any) -> Any:
        seen: list[str] = []
        getattr(block.get_submodule(path), f"register_{kind}")(lambda *_: seen.append(path))
        return seen

    return change


class Lora(nn.Module):
    """An adapter around a linear layer, as peft's: same names of attributes, another output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = (
            nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        )  # fmt: skip
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.up(self.down(x))
        return out


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def put(path: str, make: Callable[[Any], nn.Module]) -> Change:
    def change(block: Any) -> None:
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, make(block.get_submodule(path)).eval())

    return change


def louder(linear: Any) -> nn.Module:
    new = Louder(linear.in_features, linear.out_features)
    new.load_state_dict(linear.state_dict())
    return new


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(path: str) -> Change:
    return lambda block: nn.utils.parametrize.register_parametrization(
        block.get_submodule(path), "weight", Doubled()
    )


def own_forward(path: str) -> Change:
    def change(block: Any) -> None:
        module = block.get_submodule(path)
        real = module.forward
        module.forward = lambda *args, **kwargs: 2 * real(*args, **kwargs)

    return change


def drops(path: str) -> Change:
    def change(block: Any) -> None:
        block.get_submodule(path).train()

    return change


# Each leaves the block's output to be what its own code says.
CHANGES: dict[str, Change] = {
    **{
        f"{kind} on {path}": hook(path, kind)
        for path in ("attn", "attn.proj", "attn.proj_drop", "ls1", "ls2", "drop_path1", "mlp",
                     "mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop1")
        for kind in ("forward_hook", "forward_pre_hook")
    },
    "backward hook": hook("mlp.fc2", "full_backward_hook"),
    "LoRA on proj": put("attn.proj", Lora),
    "LoRA on fc1": put("mlp.fc1", Lora),
    "LoRA on fc2": put("mlp.fc2", Lora),
    "a subclass": put("mlp.fc1", louder),
    "another activation": put("mlp.act", lambda _: nn.Softplus()),
    "another MLP": put("mlp", lambda _: nn.Linear(C, C)),
    "another LayerScale": put("ls1", lambda _: nn.Softsign()),
    "parametrized proj": parametrized("attn.proj"),
    "parametrized fc1": parametrized("mlp.fc1"),
    **{
        f"own forward of {path}": own_forward(path)
        for path in ("attn", "attn.proj", "ls1", "drop_path2", "mlp", "mlp.fc1", "mlp.act",
                     "mlp.drop1")
    },
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", CHANGES)
def test_changed_blocks_run_their_own_code(what: str, when: str, ran: list[Any]) -> None:
    change = CHANGES[what]
    if when == "after":
        plain = build()
        fused = copy.deepcopy(plain)
        kdfast.accelerate(fused)
        torch.manual_seed(1)
        seen_plain = change(plain[0])  # type: ignore[index]
        torch.manual_seed(1)
        seen = change(fused[0])  # type: ignore[index]
    else:
        plain = build()
        seen_plain = seen = change(plain[0])  # type: ignore[index]
        fused = plain
    x = tokens()
    want = output(plain, x)
    if when == "before":
        kdfast.accelerate(fused)
    ran.clear()
    got = output(fused, x)
    assert type(fused[0]) not in ran  # type: ignore[index]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if what.startswith("forward"):
        assert len(seen) == (1 if when == "after" else 2) and seen_plain


@pytest.mark.parametrize(
    "path", ["norm1", "norm2", "attn.qkv", "attn.q_norm", "attn.norm", "mlp.norm"]
)
def test_hooks_on_what_is_called_are_called(path: str) -> None:
    plain = build(everything=True)
    fused = copy.deepcopy(plain)
    kdfast.accelerate(fused)
    seen = hook(path, "forward_hook")(fused[0])  # type: ignore[index]
    want = output(plain, tokens())
    torch.testing.assert_close(output(fused, tokens()), want, rtol=1e-4, atol=1e-4)
    assert seen == [path]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_projections_that_are_computed_anew(name: str, ran: list[Any]) -> None:
    plain = build()
    fused = copy.deepcopy(plain)
    kdfast.accelerate(fused)
    for model in (plain, fused):
        qkv = model[0].attn.qkv  # type: ignore[index]
        nn.utils.parametrize.register_parametrization(qkv, name, Doubled())
    ran.clear()
    want = output(plain, tokens())
    torch.testing.assert_close(output(fused, tokens()), want, rtol=1e-4, atol=1e-4)
    assert type(fused[0]) in ran  # type: ignore[index]


def test_lora_on_qkv() -> None:
    plain = build()
    put("attn.qkv", Lora)(plain[0])  # type: ignore[index]
    want = output(plain, tokens())
    kdfast.accelerate(plain)
    torch.testing.assert_close(output(plain, tokens()), want, rtol=1e-4, atol=1e-4)


def test_global_hooks_see_every_submodule(ran: list[Any]) -> None:
    holder = build()
    kdfast.accelerate(holder)
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        output(holder, tokens())
    finally:
        handle.remove()
    assert {"GELU", "Mlp", "LayerNorm"} <= set(seen) and not ran
    output(holder, tokens())
    assert ran


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gradients": lambda block, x: block(x).detach(),
    "a mask": lambda block, x: block(x, attn_mask=torch.ones(N, N).tril().bool()),
    "a mask by place": lambda block, x: block(x, torch.ones(N, N).tril().bool()),
    "causal": lambda block, x: block(x, is_causal=True),
    "x that learns": lambda block, x: block.requires_grad_(False)(x.requires_grad_()).detach(),
    "norms that learn": lambda block, x: _tuned(block, x),
    "vmap": lambda block, x: torch.vmap(block)(x[:, None])[:, 0].detach(),
    "trace": lambda block, x: torch.jit.trace(block, (x,), check_trace=False)(x).detach(),
}


def _tuned(block: Any, x: Tensor) -> Tensor:
    block.requires_grad_(False).norm1.requires_grad_(True)
    out: Tensor = block(x)
    assert out.requires_grad
    out.sum().backward()
    assert block.norm1.weight.grad.abs().sum() > 0
    return out.detach()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("what", CALLS)
def test_calls_that_run_the_blocks_own_code(
    what: str, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # That the attention says so is tested elsewhere; here a warning would be an error.
    monkeypatch.setattr(kdfast.nn.FusedAttention, "_say_once", lambda *_: None)
    plain = build()
    fused = copy.deepcopy(plain)
    kdfast.accelerate(fused)
    want = CALLS[what](plain[0], tokens())  # type: ignore[index]
    got = CALLS[what](fused[0], tokens())  # type: ignore[index]
    assert type(fused[0]) not in ran  # type: ignore[index]
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-4, atol=1e-4)
    # And the next call in inference is fused.
    torch.testing.assert_close(
        output(fused, tokens()), output(plain, tokens()), rtol=1e-4, atol=1e-4
    )
    assert type(fused[0]) in ran  # type: ignore[index]


def test_a_frozen_block_is_fused_with_gradients_on(ran: list[Any]) -> None:
    holder = build()
    holder.requires_grad_(False)
    kdfast.accelerate(holder)
    holder(tokens())
    assert ran


@pytest.mark.parametrize("path", ["drop_path1", "attn.proj_drop", "mlp.drop1"])
def test_dropout_in_training_drops(path: str, ran: list[Any]) -> None:
    plain = build(everything=True)
    fused = copy.deepcopy(plain)
    kdfast.accelerate(fused)
    outputs = []
    for holder in (plain, fused):
        drops(path)(holder[0])  # type: ignore[index]
        torch.manual_seed(2)
        outputs.append(output(holder, tokens()))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert type(fused[0]) not in ran  # type: ignore[index]


def test_training_is_the_blocks_own_code(ran: list[Any]) -> None:
    plain = build()
    fused = copy.deepcopy(plain)
    kdfast.accelerate(fused)
    for model in (plain, fused):
        model.train()(tokens()).square().sum().backward()
    assert not ran
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-2)


def test_layers_left_with_a_reason() -> None:
    holder = nn.ModuleDict({"sub": Louder(4, 4), "lazy": nn.LazyConv2d(4, 16, 16)})
    holder["changed"] = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(holder["changed"], "weight", Doubled())
    holder["own"], holder["compiled"] = nn.Linear(4, 4), nn.Linear(4, 4)
    holder["own"].forward = holder["own"].forward
    holder["compiled"].compile()
    report = kdfast.accelerate(holder)
    assert not report.layers
    assert {row.name: row.detail for row in report.layers_left} == {
        "sub": f"{__name__}.Louder may compute something else than its base class",
        "changed": "it is parametrized",
        "own": "its instance has a forward of its own",
        "compiled": "it is compiled already; accelerate first, then compile",
    }
