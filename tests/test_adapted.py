# SPDX-License-Identifier: Apache-2.0
"""Layers that compute more than their tensors say: adapters, parametrizations, masks, quantized
ones. Scores and calibration see what they compute, pruning cuts nothing of them by accident."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import kdfast
from kdfast.pruning.effective import effective, obstacle

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
PATHS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class Lora(nn.Module):
    """As peft builds it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.A = nn.Parameter(torch.randn(4, base.in_features) * 0.3)
        self.B = nn.Parameter(torch.randn(base.out_features, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + x @ self.A.T @ self.B.T
        return out


class LoraWithNames(Lora):
    """With the base layer's tensors under their usual names."""

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)
    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)


class Wrapped(nn.Module):
    """A wrapper that says nothing of what it holds."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.inner = base

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.inner(x)  # type: ignore[no-any-return]


class Louder(nn.Linear):
    """A subclass whose forward is its own, like loralib's or bitsandbytes' layers."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def louder(linear: nn.Linear) -> nn.Module:
    new = Louder(linear.in_features, linear.out_features)
    new.load_state_dict(linear.state_dict())
    return new


def doubled(linear: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


def masked(linear: nn.Linear) -> nn.Module:
    prune.random_unstructured(linear, "weight", amount=0.4)  # type: ignore[no-untyped-call]
    return linear


def own_forward(linear: nn.Linear) -> nn.Module:
    real = linear.forward
    linear.forward = lambda x: 2 * real(x)  # type: ignore[method-assign]
    return linear


Make = Callable[[Any], nn.Module]
# What is put in place of a layer, and a word of the way out that an error has to name.
KINDS: dict[str, tuple[Make, str]] = {
    "LoRA": (Lora, "merge_and_unload"),
    "LoRA with names": (LoraWithNames, "merge_and_unload"),
    "a wrapper": (Wrapped, "put an nn.Linear in its place"),
    "a subclass": (louder, "put an nn.Linear in its place"),
    "an own forward": (own_forward, "delete it first"),
    "a parametrization": (doubled, "remove_parametrizations"),
    "weight norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "weight norm by hooks": (weight_norm, "remove_weight_norm"),
    "spectral norm by hooks": (spectral_norm, "remove_spectral_norm"),
    "a mask": (masked, "prune.remove"),
}


def tiny() -> Any:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=5
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def put(model: Any, path: str, make: Make, blocks: tuple[int, ...] = (0, 1)) -> None:
    parent, _, leaf = path.rpartition(".")
    for index in blocks:
        holder = model.blocks[index].get_submodule(parent)
        setattr(holder, leaf, make(getattr(holder, leaf)).eval())


def changed(path: str, kind: str) -> tuple[Any, Any]:
    """A model with such layers, and a plain one with the same function."""
    model = tiny()
    put(model, path, KINDS[kind][0])
    plain = tiny()
    for block, theirs in zip(plain.blocks, model.blocks, strict=True):
        layer = block.get_submodule(path)
        with torch.no_grad():
            source = theirs.get_submodule(path)
            shift = source(torch.zeros(1, layer.in_features))
            layer.weight.copy_((source(torch.eye(layer.in_features)) - shift).T)
            layer.bias.copy_(shift[0])
            torch.testing.assert_close(model(IMAGES), model(IMAGES))
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=1e-3, atol=1e-3)
    return model, plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_scores_are_those_of_the_plain_model(path: str, kind: str) -> None:
    model, plain = changed(path, kind)
    modes = [module.training for module in model.modules()]
    for method, data in (("magnitude", None), ("taylor", [IMAGES])):
        ours, theirs = (
            kdfast.head_scores(m, method, data, progress=False).scores for m in (model, plain)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    if kind != "a wrapper" or path != "mlp.fc2":
        ours, theirs = (kdfast.mlp_scores(m, "magnitude").scores for m in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["attn.proj", "attn.qkv"])
@pytest.mark.filterwarnings("ignore:calibrate")
def test_calibration_is_that_of_the_plain_model(path: str, kind: str) -> None:
    model, plain = changed(path, kind)
    ours, theirs = (
        kdfast.head_scores(m, "reconstruction", [IMAGES], progress=False).scores
        for m in (model, plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_a_layer_that_would_be_cut_is_named(path: str, kind: str) -> None:
    model, _ = changed(path, kind)
    with torch.no_grad():
        before = model(IMAGES)
    names = [(name, type(module)) for name, module in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mlp = [[0, 1, 2], [5]] if path.startswith("mlp") else None
    heads = None if mlp else [[0], [1, 2]]
    with pytest.raises(ValueError, match="prune_heads") as error:
        kdfast.prune_heads(model, heads, mlp=mlp)
    if kind != "a wrapper" or path != "mlp.fc2":  # its MLP is not known at all
        assert f"blocks.0.{path}" in str(error.value) and KINDS[kind][1] in str(error.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "an own forward"])
def test_layers_that_are_not_cut_may_be_anything(kind: str) -> None:
    """Adapted blocks keep their heads, others are cut; and the MLP is no obstacle for heads."""
    model, plain = tiny(), None
    put(model, "attn.qkv", KINDS[kind][0], blocks=(1,))
    put(model, "mlp.fc1", KINDS[kind][0])
    with torch.no_grad():
        model(IMAGES)
    small = kdfast.prune_heads(model, [[0, 2], [0, 1, 2]])
    plain = copy.deepcopy(model)
    attn = plain.blocks[0].attn
    attn.proj.register_forward_pre_hook(
        lambda _, args: (args[0] * torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(16),)
    )
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), plain(IMAGES), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_accelerated(path: str, kind: str, when: str) -> None:
    model = tiny()
    plain = copy.deepcopy(model)
    if when == "after":
        kdfast.accelerate(model)
    for each in (plain, model):
        torch.manual_seed(7)
        put(each, path, KINDS[kind][0])
    report = kdfast.accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=1e-3, atol=1e-3)
    left = {row.name for row in report.blocks_left}
    if path == "attn.proj":
        assert left == {"blocks.0", "blocks.1"}
    elif path.startswith("mlp"):
        assert {"blocks.0", "blocks.0.mlp"} <= left
    for each in (plain, model):
        each.zero_grad()
        each(IMAGES).sum().backward()
    ours, theirs = (m.blocks[0].norm1.weight.grad for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_what_is_taken_away_can_be_cut() -> None:
    model = tiny()
    for block in model.blocks:
        parametrizations.weight_norm(block.attn.qkv)
        parametrize.remove_parametrizations(block.attn.qkv, "weight")
        masked(block.attn.proj)
        prune.remove(block.attn.proj, "weight")  # type: ignore[no-untyped-call]
    small = kdfast.prune_heads(model, [[0], [1, 2]])
    assert small(IMAGES).shape == (4, 5)


def test_quantized_layers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny(), {nn.Linear}, dtype=torch.qint8)
        want = kdfast.head_scores(tiny(), "magnitude").scores
        got = kdfast.head_scores(model, "magnitude").scores
        torch.testing.assert_close(got, want, rtol=3e-2, atol=1e-3)
        with pytest.raises(ValueError, match="blocks.0.attn.qkv is a torch.ao.nn.quantized"):
            kdfast.prune_heads(model, [[0], [1]])
        x = model(IMAGES)
        kdfast.accelerate(model)
        torch.testing.assert_close(model(IMAGES), x, rtol=1e-2, atol=1e-2)


class Int8(Tensor):
    """A weight that stands for another tensor, as torchao's do."""

    whole: Tensor

    @staticmethod
    def of(weight: Tensor) -> "Int8":
        made = torch.zeros_like(weight).as_subclass(Int8)
        made.whole = weight.detach()
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = [a.whole if isinstance(a, Int8) else a for a in args]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_that_are_no_plain_tensors() -> None:
    model, plain = tiny(), tiny()
    for block in model.blocks:
        for path in PATHS:
            layer: Any = block.get_submodule(path)
            layer.weight = nn.Parameter(Int8.of(layer.weight), requires_grad=False)
            layer.weight.whole = plain.get_submodule(f"blocks.0.{path}").weight.detach()
    for path in PATHS:
        plain.blocks[1].get_submodule(path).weight = plain.blocks[0].get_submodule(path).weight
        plain.blocks[1].get_submodule(path).bias = plain.blocks[0].get_submodule(path).bias
        model.blocks[1].get_submodule(path).bias = model.blocks[0].get_submodule(path).bias
    with pytest.raises(ValueError, match="blocks.0.attn.qkv has a Int8 as weight"):
        kdfast.prune_heads(model, [[0], [1]])
    scores = kdfast.head_scores(model, "magnitude").scores[0]
    torch.testing.assert_close(
        scores, kdfast.head_scores(plain, "magnitude").scores[0], rtol=1e-3, atol=1e-6
    )
    with torch.no_grad():
        want = model(IMAGES)
        report = kdfast.accelerate(model)
        torch.testing.assert_close(model(IMAGES), want, rtol=1e-4, atol=1e-4)
    assert {r.detail for r in report.layers_left} == {"its weight is a Int8, no plain tensor"}


def test_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    for layer in model.layers:
        layer.attention.q_proj = Lora(layer.attention.q_proj)
    assert kdfast.head_scores(model, "magnitude").scores[0].shape == (2,)
    with pytest.raises(ValueError, match=r"layers.0.attention.q_proj is an adapter"):
        kdfast.prune_heads(model, [[0], [1]])
    with torch.no_grad():
        want = model(IMAGES)[0]
        kdfast.accelerate(model)
        torch.testing.assert_close(model(IMAGES)[0], want, rtol=1e-4, atol=1e-4)


def test_saving_says_what_differs(tmp_path: Any) -> None:
    model = tiny()
    put(model, "attn.qkv", Lora)
    with pytest.raises((TypeError, ValueError), match="qkv"):
        kdfast.save_pretrained(model, tmp_path / "lora")


def test_a_layer_that_is_not_linear_is_named() -> None:
    class Gated(Lora):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    layer = Gated(nn.Linear(8, 6))
    assert obstacle(layer) is not None
    with pytest.raises(ValueError, match="qkv must be linear in its input, got .*Gated"):
        effective("qkv", layer)
