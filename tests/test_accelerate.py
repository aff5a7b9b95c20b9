# SPDX-License-Identifier: Apache-2.0
"""accelerate and restore: the swap itself, on timm's Attention. Values of all classes are in
test_accelerate_classes.py."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

import kdfast
from kdfast.nn import FusedAttention, TimmAttention, TorchMultiheadAttention
from kdfast.testing import assert_no_worse, run


def tiny(**kwargs: object) -> nn.Module:
    """A ViT of two blocks with 3 heads of 16 and tokens that are no multiple of anything."""
    options = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model(
        "vit_tiny_patch16_224", **{**options, "num_classes": 5, "qkv_bias": True, **kwargs}
    )


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def test_replaces_in_place_and_restores() -> None:
    model = tiny()
    x, keys = images(), list(model.state_dict())
    parameters = dict(model.named_parameters())
    originals = [block.attn for block in model.blocks]
    want = model(x)
    report = kdfast.accelerate(model)
    assert [site.name for site in report.replaced] == ["blocks.0.attn", "blocks.1.attn"]
    assert report.left == () and report.complete
    assert all(type(block.attn) is TimmAttention for block in model.blocks)
    assert list(model.state_dict()) == keys
    assert all(value is parameters[name] for name, value in model.named_parameters())
    torch.testing.assert_close(model(x), want)
    assert kdfast.restore(model) == report.count == 2 + 9 + 4
    assert all(b.attn is original for b, original in zip(model.blocks, originals, strict=True))
    assert torch.equal(model(x), want)
    assert kdfast.restore(model) == 0


def test_report_prints() -> None:
    model = tiny()
    model.blocks[1].attn.attn_drop = nn.Softsign()
    report = kdfast.accelerate(model)
    assert not report.complete
    reason = "a torch.nn.modules.activation.Softsign as attn_drop, which the kernel would go around"
    assert report.left[0][::2] == ("blocks.1.attn", reason)
    assert report.blocks_left[0][::2] == ("blocks.1", "attn is not fused; its own code runs")
    lines = str(report).splitlines()
    counts = "1 of 2 attention modules, 9 of 9 linear layers, 3 of 4 blocks"
    assert lines[0] == f"kdfast.accelerate: {counts} run fused"
    assert lines[2].split() == [
        "fused", "1", "timm.layers.attention.Attention", "TimmAttention", "blocks.0.attn",
    ]  # fmt: skip
    assert lines[6].startswith("left") and lines[6].endswith("blocks.1.attn")
    assert lines[7].startswith("left") and lines[7].endswith("blocks.1")
    nothing = str(kdfast.accelerate(nn.Sequential()))
    assert nothing.startswith("kdfast.accelerate: nothing runs fused; the model has no attention")


def test_twice_changes_the_backend_only() -> None:
    model = tiny()
    first = kdfast.accelerate(model)
    modules = list(model.modules())
    assert kdfast.accelerate(model) == first
    second = kdfast.accelerate(model, backend="reference")
    assert second.replaced == first.replaced and second.count == 2
    assert list(model.modules()) == modules
    assert {block.attn.backend for block in model.blocks} == {"reference"}


def test_what_happens_to_one_happens_to_the_other() -> None:
    model = tiny()
    kdfast.accelerate(model)
    fused, original = model.blocks[0].attn, model.blocks[0].attn.original()
    model.double()
    assert original.qkv.weight.dtype == torch.float64
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert not original.proj.bias.any() and original.proj.bias is fused.proj.bias
    model.eval()
    assert not fused.original().training


def test_state_dict_loads_both_ways() -> None:
    plain, fused = tiny(), tiny()
    kdfast.accelerate(fused)
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(images()), plain(images()))
    other = tiny()
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(images()), plain(images()))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole(how) -> None:  # type: ignore[no-untyped-def]
    model = tiny()
    kdfast.accelerate(model)
    twin = how(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(images()).abs().sum() > 0
    assert kdfast.restore(twin) == 15
    attn = twin.blocks[0].attn
    assert type(attn) is Attention and attn.qkv.weight.abs().sum() > 0


def test_hooks_go_along() -> None:
    model, seen = tiny(), []
    model.blocks[0].attn.register_forward_hook(lambda *_: seen.append("hook"))
    kdfast.accelerate(model)
    model(images())
    kdfast.restore(model)
    model(images())
    assert seen == ["hook", "hook"]


def test_a_shared_module_is_replaced_everywhere() -> None:
    model = tiny()
    model.blocks[1].attn = model.blocks[0].attn
    assert len(kdfast.accelerate(model).replaced) == 1
    assert model.blocks[1].attn is model.blocks[0].attn
    assert isinstance(model.blocks[1].attn, TimmAttention)


class Louder(Attention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(x)


def test_left_with_a_reason() -> None:
    holder = nn.ModuleDict(
        {name: Attention(16, 2) for name in ("own", "compiled")} | {"sub": Louder(16, 2)}
    )
    holder["own"].forward = holder["own"].forward
    holder["compiled"].compile()
    reasons = {site.name: site.detail for site in kdfast.accelerate(holder).left}
    assert reasons == {
        "own": "its instance has a forward of its own",
        "compiled": "it is compiled already; accelerate first, then compile",
        "sub": "a subclass of timm.layers.attention.Attention, whose forward may differ",
    }
    assert "the model itself" in kdfast.accelerate(Attention(16, 2)).left[0].detail


def test_mask_and_causal_run_torchs_attention_and_say_so(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("kdfast.nn.attention._warned", set())
    holder = nn.Sequential(Attention(24, 3, qkv_bias=True))
    x, mask = torch.randn(2, 7, 24), torch.rand(7, 7) > 0.3
    mask |= torch.eye(7, dtype=torch.bool)
    masked, causal = holder[0](x, attn_mask=mask), holder[0](x, is_causal=True)
    kdfast.accelerate(holder)
    with pytest.warns(
        kdfast.FallbackWarning, match="Attention: the fused kernel cannot run a mask"
    ):
        torch.testing.assert_close(holder[0](x, attn_mask=mask), masked)
    with pytest.warns(kdfast.FallbackWarning, match="cannot run a causal call"):
        torch.testing.assert_close(holder[0](x, is_causal=True), causal)
    holder[0](x, mask)  # said once: a second warning would be an error here
    kdfast.accelerate(holder, backend="fused")
    with pytest.raises(NotImplementedError, match="backend='fused' cannot run a mask"):
        holder[0](x, mask)


def test_dropout_that_is_turned_on_later(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("kdfast.nn.attention._warned", set())
    holder = nn.Sequential(Attention(24, 3))
    x = torch.randn(2, 7, 24)
    kdfast.accelerate(holder)
    want = holder(x)
    holder[0].attn_drop.p = 0.5
    torch.testing.assert_close(holder.eval()(x), want)
    with pytest.warns(kdfast.FallbackWarning, match="attention dropout 0.5"):
        assert not torch.allclose(holder.train()(x), want)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: kdfast.accelerate("vit"), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: kdfast.restore(None), TypeError, "model must be a torch.nn.Module, got NoneType"),
        (lambda: kdfast.accelerate(tiny(), backend="gpu"), ValueError, "backend must be one of"),
        (
            lambda: kdfast.restore(TimmAttention.adopt(Attention(16, 2))),
            ValueError,
            "got the attention itself",
        ),
        (
            lambda: TorchMultiheadAttention.adopt(nn.MultiheadAttention(16, 2, kdim=8)),
            NotImplementedError,
            "another width than queries",
        ),
    ],
)
def test_rejects(call, error: type[Exception], match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=match):
        call()


def masked_oracle(attn: FusedAttention, heads: list[int], x: Tensor) -> Tensor:
    """The whole attention with the context of all other heads set to zero."""
    mask = torch.zeros(attn.num_heads, 1)
    mask[heads] = 1
    hook = attn.projection().register_forward_pre_hook(
        lambda _, args: (args[0].unflatten(-1, (attn.num_heads, -1)) * mask).flatten(-2)
    )
    try:
        return attn(x)
    finally:
        hook.remove()


@pytest.mark.parametrize("heads", [[2], [0, 3], [0, 1, 2, 3], []], ids=str)
def test_keep_heads(heads: list[int]) -> None:
    original = Attention(24, 4, attn_head_dim=10, qkv_bias=True, gated=True)
    attn = TimmAttention.adopt(copy.deepcopy(original))
    x = torch.randn(2, 7, 24)
    want = masked_oracle(attn, heads, x)
    attn.keep_heads(heads)
    torch.testing.assert_close(attn(x), want)
    assert attn.heads == heads and attn.num_heads == len(heads)
    assert attn.qkv.weight.shape == (30 * len(heads), 24)
    assert attn.qkv.out_features == 30 * len(heads) and attn.proj.in_features == 10 * len(heads)
    attn(x).sum().backward()
    if heads:
        assert attn.qkv.weight.grad.abs().sum() > 0
    assert attn.original() is None
    with pytest.raises(ValueError, match="restore: 0 must hold all its heads"):
        kdfast.restore(nn.Sequential(attn))


def test_keep_heads_names_originals_and_rejects() -> None:
    attn = TimmAttention.adopt(Attention(24, 4))
    x = torch.randn(1, 5, 24)
    want = masked_oracle(attn, [3], x)
    attn.keep_heads([3, 1])
    assert attn.heads == [1, 3]
    with pytest.raises(ValueError, match=r"heads must be held, \[2\] are not in \[1, 3\]"):
        attn.keep_heads([1, 2])
    with pytest.raises(ValueError, match="must not repeat"):
        attn.keep_heads([1, 1])
    attn.keep_heads([3])
    assert attn.heads == [3]
    torch.testing.assert_close(attn(x), want)


def test_numerics_of_a_training_step() -> None:
    """Not worse than timm in low precision, by the rule, outputs and all gradients."""
    exact_model = tiny().double()
    names = [name for name, _ in exact_model.named_parameters()]

    def step(dtype: torch.dtype, fused: bool) -> list[Tensor]:
        model = copy.deepcopy(exact_model).to(dtype)
        if fused:
            kdfast.accelerate(model)

        def call(x: Tensor, *parameters: Tensor) -> Tensor:
            state = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(model, state, (x,))

        return run(call, [images().to(dtype), *(p.to(dtype) for p in exact_model.parameters())])

    exact = step(torch.float64, False)
    for dtype in (torch.float32, torch.bfloat16):
        triples = zip(step(dtype, True), exact, step(dtype, False), strict=True)
        for name, triple in zip(["out", "dx", *names], triples, strict=True):
            assert_no_worse(f"{name} {dtype}", *triple)
