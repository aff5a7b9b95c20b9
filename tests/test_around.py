# SPDX-License-Identifier: Apache-2.0
"""What a stand-in goes around is looked at first: every submodule that an original calls and the
stand-in does not is watched, and a call in which something watches it runs the original's code."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import kdfast
from kdfast.nn import FusedAttention
from tests.test_accelerate_classes import CASES, build, others


@pytest.fixture(autouse=True)
def _fallbacks_are_meant(_isolate: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("kdfast.nn.attention._warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kdfast.FallbackWarning)
        yield


def called(holder: nn.Module, args: tuple[Tensor, ...]) -> dict[str, int]:
    """How often each submodule is called in a forward."""
    calls: dict[str, int] = {}
    handles = [
        m.register_forward_hook(lambda *_, n=n: calls.update({n: calls.get(n, 0) + 1}))
        for n, m in holder.named_modules()
    ]
    with torch.no_grad():
        holder[0](*args)  # type: ignore[index]
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("case", CASES)
def test_what_is_gone_around_is_listed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next stand-in that goes around a submodule has to say so."""
    holder, inputs = build(case)
    holder.float().eval()
    args = (inputs[0].float(), *others(inputs, torch.float32))
    wanted: dict[str, int] = {}
    for fused in (True, False):
        if "fused_attn" in holder[0].__dict__:
            holder[0].fused_attn = fused
        wanted.update(called(holder, args))
    kdfast.accelerate(holder, replace_eager=True)
    attn = holder[0]
    assert isinstance(attn, FusedAttention)
    monkeypatch.setattr(type(attn), "own_code", lambda self: None)
    around = {f"0.{name}" for name in attn.around}
    # Projections of pools are folded while they are plain, which a hook is against.
    missing = {n for n in wanted if n not in called(holder, args)}
    assert {n for n in missing if not n.startswith(tuple(around))} == set()


@pytest.mark.parametrize("case", CASES)
def test_a_hook_on_what_is_gone_around_sees_it(case: str) -> None:
    holder, inputs = build(case)
    holder.float().eval()
    args = (inputs[0].float(), *others(inputs, torch.float32))
    fused = copy.deepcopy(holder)
    report = kdfast.accelerate(fused, replace_eager=True)
    assert report.replaced
    for name in fused[0].around:
        if fused[0]._modules.get(name) is None:
            continue
        plain = copy.deepcopy(holder)
        if "fused_attn" in plain[0].__dict__:
            plain[0].fused_attn = False
            fused[0].fused_attn = False
        seen: list[list[Tensor]] = [[], []]
        outs = []
        for model, maps in zip((plain, fused), seen, strict=True):
            hook = getattr(model[0], name).register_forward_hook(
                lambda _, i, o, maps=maps: maps.append(o.detach())
            )
            with torch.no_grad():
                outs.append(model[0](*args))
            hook.remove()
        assert len(seen[0]) == len(seen[1]) == 1
        torch.testing.assert_close(seen[1], seen[0])
        torch.testing.assert_close(*outs)


KINDS = {
    "forward": lambda m, f: m.register_forward_hook(lambda *_: f()),
    "pre": lambda m, f: m.register_forward_pre_hook(lambda *_: f()),
    "kwargs": lambda m, f: m.register_forward_hook(lambda *_: f(), with_kwargs=True),
    "always": lambda m, f: m.register_forward_hook(lambda *_: f(), always_call=True),
    "backward": lambda m, f: m.register_full_backward_hook(lambda *_: f()),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(lambda *_: f()),
    "all modules": lambda m, f: torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: f() if module is m else None
    ),
}


def tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **{**size, **options}).eval()


def told(model: Any, fused: bool = False) -> Any:
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_hook_on_attn_drop_fires(kind: str, order: str) -> None:
    model: Any = told(tiny())
    seen: list[int] = []
    handles = []

    def watch() -> None:
        for block in model.blocks:
            handles.append(KINDS[kind](block.attn.attn_drop, lambda: seen.append(1)))

    if order == "before":
        watch()
    kdfast.accelerate(model, replace_eager=True)
    if order == "after":
        told(model)
        watch()
    try:
        model(IMAGES).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2
    told(model, True)
    kdfast.accelerate(model)
    seen.clear()
    model(IMAGES)
    assert not seen and all(isinstance(b.attn, FusedAttention) for b in model.blocks)


def test_module_hooks_fire_once() -> None:
    """Also where the original's code runs: it shares its table of hooks with the stand-in."""
    holder = nn.Sequential(nn.MultiheadAttention(24, 3, batch_first=True))
    told_model: Any = told(tiny())
    seen: list[str] = []
    holder[0].register_forward_hook(lambda *_: seen.append("torch"))
    kdfast.accelerate(holder)
    x = torch.randn(2, 4, 24)
    holder[0](x, x, x, attn_mask=torch.zeros(4, 4))
    kdfast.accelerate(told_model, replace_eager=True)
    told(told_model)
    told_model.blocks[0].attn.register_forward_hook(lambda *_: seen.append("timm"))
    told_model(IMAGES)
    assert seen == ["torch", "timm"]


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.maps.append(x)
        return 2 * x


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_module_in_place_of_attn_drop(order: str) -> None:
    model: Any = told(tiny())
    plain = copy.deepcopy(model)
    for each in (plain, model):
        if each is model and order == "after":
            kdfast.accelerate(model, replace_eager=True)
            told(model)
        for block in each.blocks:
            block.attn.attn_drop = Recorder()
    kdfast.accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), plain(IMAGES))
    assert len(model.blocks[1].attn.attn_drop.maps) == 1


def test_an_explicit_eager_is_respected() -> None:
    model: Any = told(tiny())
    report = kdfast.accelerate(model)
    assert not report.replaced and len(report.left) == 2
    assert "fused_attn=False" in report.left[0].detail
    assert "replace_eager=True" in report.left[0].detail
    assert kdfast.accelerate(model, replace_eager=True).complete
    kdfast.restore(model)
    assert [block.attn.fused_attn for block in model.blocks] == [False, False]


def test_timms_switch_for_all_models_is_respected() -> None:
    timm.layers.set_fused_attn(False)
    try:
        model = tiny()
        swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1))
        assert not kdfast.accelerate(model).replaced
        assert not kdfast.accelerate(swin).replaced
    finally:
        timm.layers.set_fused_attn(True)
    assert kdfast.accelerate(tiny()).complete
    # Swin's own default is False: nobody's wish.
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1))
    assert kdfast.accelerate(swin).complete


def test_a_switch_after_accelerate_is_respected() -> None:
    model: Any = tiny()
    kdfast.accelerate(model)
    told(model)
    maps: list[Tensor] = []
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda _, i, o: maps.append(o))
    with pytest.warns(kdfast.FallbackWarning, match=r"fused_attn=False \(first in blocks.0.attn\)"):
        model(IMAGES)
    assert [m.shape for m in maps] == [(2, 3, 5, 5)]
    report = kdfast.accelerate(model)
    assert not report.replaced and type(model.blocks[0].attn) is Attention


def test_pruned_attentions_give_their_maps() -> None:
    """Without an original the stand-in computes them itself."""
    whole: Any = told(tiny())
    small: Any = kdfast.prune_heads(whole, [[0, 2], [1]]).eval()
    maps: dict[str, list[Tensor]] = {"whole": [], "small": []}
    for name, model in (("whole", whole), ("small", small)):
        for block in model.blocks:
            block.attn.attn_drop.register_forward_hook(
                lambda _, i, o, n=name: maps[n].append(o.detach())
            )
        model(IMAGES)
    torch.testing.assert_close(maps["small"][0], maps["whole"][0][:, [0, 2]])
    assert [m.shape[1] for m in maps["small"]] == [2, 1]


@pytest.mark.parametrize("method", ["fx", "hook"])
@pytest.mark.parametrize("name", ["vit", "eva", "swin"])
def test_timms_attention_extract(name: str, method: str) -> None:
    make: dict[str, Callable[[], Any]] = {
        "vit": lambda: told(tiny()),
        "eva": lambda: told(
            timm.create_model(
                "eva02_tiny_patch14_224", img_size=28, depth=1, embed_dim=48, num_heads=3
            )
        ),
        "swin": lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=16,
            num_heads=(2, 4),
        ),
    }  # fmt: skip
    model = make[name]().eval()
    x = torch.randn(1, 3, *((28, 28) if name == "eva" else (32, 32) if name == "vit" else (56, 56)))
    names = ["*softmax"] if method == "fx" else None
    with torch.no_grad():
        want = AttentionExtract(copy.deepcopy(model), names=names, method=method)(x)
        kdfast.accelerate(model)
        got = AttentionExtract(model, names=names, method=method)(x)
    assert len(want) >= 1 and len(got) == len(want)
    for one, other in zip(got.values(), want.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_feature_extractors() -> None:
    model = tiny()
    with torch.no_grad():
        want = create_feature_extractor(copy.deepcopy(model), ["blocks.0.attn.qkv", "blocks.1"])(
            IMAGES
        )
        kdfast.accelerate(model)
        got = create_feature_extractor(model, ["blocks.0.attn.qkv", "blocks.1"])(IMAGES)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_attributes_that_are_set_on_the_stand_in_reach_the_original() -> None:
    holder = nn.Sequential(nn.MultiheadAttention(24, 3, batch_first=True))
    kdfast.accelerate(holder)
    holder[0].dropout = 0.5
    x = torch.randn(1, 4, 24)
    torch.manual_seed(0)
    got = holder.train()[0](x, x, x, need_weights=False)[0]
    kdfast.restore(holder)
    assert holder[0].dropout == 0.5
    torch.manual_seed(0)
    torch.testing.assert_close(got, holder[0](x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("fused", [True, False])
def test_attention_dropout_is_the_originals(fused: bool) -> None:
    """In eval the kernel runs; in training the original does, with its random numbers."""
    plain: Any = told(tiny(attn_drop_rate=0.3), fused)
    model = copy.deepcopy(plain)
    report = kdfast.accelerate(model, replace_eager=True)
    assert report.complete
    assert report.replaced[0].detail == "TimmAttention, in eval (attention dropout 0.3)"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", kdfast.FallbackWarning)
        torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-5)
    for each in (plain, model):
        each.train()
    outs = []
    for each in (plain, model):
        torch.manual_seed(5)
        outs.append(each(IMAGES))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)


def test_dropout_that_alone_is_in_training_drops() -> None:
    """Monte Carlo dropout: users put only the dropouts into training mode."""
    plain: Any = told(tiny(attn_drop_rate=0.3))
    model = copy.deepcopy(plain)
    kdfast.accelerate(model, replace_eager=True)
    told(model)
    outs = []
    for each in (plain, model):
        for block in each.blocks:
            block.attn.attn_drop.train()
        torch.manual_seed(5)
        outs.append(each(IMAGES).detach())
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)


@pytest.fixture
def patched() -> Iterator[None]:
    real = Attention.forward

    def twice(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * real(self, x, *args, **kwargs)

    Attention.forward = twice  # type: ignore[method-assign]
    yield
    Attention.forward = real  # type: ignore[method-assign]


@pytest.mark.usefixtures("patched")
def test_a_class_whose_forward_was_replaced_is_left() -> None:
    report = kdfast.accelerate(nn.Sequential(Attention(16, 2)))
    assert "was put there by" in report.left[0].detail


def test_transformers_eager_is_respected() -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**size, image_size=24, patch_size=8, intermediate_size=48)
    model = transformers.ViTModel._from_config(config, attn_implementation="eager").eval()
    x = torch.randn(1, 3, 24, 24)
    want = model(x, output_attentions=True).attentions
    report = kdfast.accelerate(model)
    assert not report.replaced and '"eager" was asked for' in report.left[0].detail
    assert len(model(x, output_attentions=True).attentions) == 2
    assert kdfast.accelerate(model, replace_eager=True).complete
    # Weights that a call asks for are given.
    torch.testing.assert_close(model(x, output_attentions=True).attentions, want)
    torch.testing.assert_close(
        model(x)[0], model(x, output_attentions=True)[0], rtol=1e-4, atol=1e-5
    )
