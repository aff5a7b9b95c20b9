# SPDX-License-Identifier: Apache-2.0
"""Blocks fused in inference: values of every class, and every call that must run their own code."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import DropPath, GluMlp
from timm.layers.activations import GELUTanh, QuickGELU
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

import kdfast
from kdfast.nn import block as block_module
from kdfast.nn.attention import qualified_name
from kdfast.testing import assert_no_worse, small_eva

os.environ.setdefault("HF_HUB_OFFLINE", "1")

C, HEADS, B, N = 96, 6, 2, 64  # B * N * C * C is above LEAST_WORK
Case = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


pytestmark = pytest.mark.usefixtures("ran")


def timm_block(**options: Any) -> Case:
    return lambda: (Block(C, HEADS, qkv_bias=True, **options), ())


def rope() -> Tensor:
    angles = torch.randn(N - 1, 8, generator=torch.Generator().manual_seed(2))
    angles = angles.repeat_interleave(2, -1)
    return torch.cat((angles.sin(), angles.cos()), -1)


def eva_block(**options: Any) -> Case:
    return lambda: (EvaBlock(C, HEADS, mlp_ratio=2, **options), (rope(),))


def hugging_face(name: str, layer: str, **options: Any) -> Case:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(
            hidden_size=C, intermediate_size=2 * C, num_hidden_layers=1, num_attention_heads=HEADS,
            image_size=64, patch_size=8, **options,
        )  # fmt: skip
        model = getattr(transformers, f"{name}Model")(config)
        found = next(m for m in model.modules() if type(m).__name__ == layer)
        # The attention interface is switched on for models only: the layer is reached through it.
        holder = nn.ModuleDict({"model": model})
        holder.layer = (found,)  # type: ignore[assignment]
        return holder, (None,) if layer in _MASKED else ()

    return make


_MASKED = ("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer")
_DINO = {"mlp_ratio": 2, "drop_path_rate": 0.1}
CASES: dict[str, Case] = {
    "timm": timm_block(),
    "timm LayerScale": timm_block(init_values=0.3),
    "timm everything": timm_block(
        qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.3, drop_path=0.2,
        proj_drop=0.1,
    ),
    "timm without bias": lambda: (Block(C, HEADS, qkv_bias=False, proj_bias=False), ()),
    "timm QuickGELU": timm_block(act_layer=QuickGELU, init_values=0.3),
    "timm QuickGELU and norm": timm_block(act_layer=QuickGELU, scale_mlp_norm=True),
    "timm tanh": timm_block(act_layer=GELUTanh),
    "timm torch's tanh": timm_block(act_layer=partial(nn.GELU, approximate="tanh")),
    "timm ReLU": timm_block(act_layer=nn.ReLU),
    "timm GluMlp": timm_block(mlp_layer=GluMlp, act_layer=nn.SiLU),
    "timm GluMlp, gate first": timm_block(
        mlp_layer=partial(GluMlp, gate_last=False), act_layer=nn.SiLU, init_values=0.3
    ),
    "EVA": eva_block(init_values=0.3),
    "EVA SwiGLU": eva_block(swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "EVA GluMlp": eva_block(swiglu_mlp=True, qkv_fused=True, init_values=0.3),
    "EVA scaled attention": eva_block(scale_attn_inner=True, swiglu_mlp=True, drop_path=0.1),
    "torchvision": lambda: (EncoderBlock(HEADS, C, 2 * C, 0.1, 0.0), ()),
    "ViT": hugging_face("ViT", "ViTLayer"),
    "ViT without bias": hugging_face("ViT", "ViTLayer", qkv_bias=False, hidden_act="gelu_new"),
    "DeiT": hugging_face("DeiT", "DeiTLayer"),
    "DINOv2": hugging_face("Dinov2", "Dinov2Layer", **_DINO),
    "DINOv2 SwiGLU": hugging_face("Dinov2", "Dinov2Layer", use_swiglu_ffn=True, **_DINO),
    "DINOv2 registers": hugging_face("Dinov2WithRegisters", "Dinov2WithRegistersLayer", **_DINO),
    "CLIP": hugging_face("CLIPVision", "CLIPEncoderLayer"),
    "SigLIP": hugging_face("SiglipVision", "SiglipEncoderLayer"),
    "SigLIP 2": hugging_face("Siglip2Vision", "Siglip2EncoderLayer", num_patches=64),
}  # fmt: skip
# What oneDNN has no name for: these run their own code, and are right.
OWN = ("timm QuickGELU and norm", "ViT without bias")


def build(case: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A holder of a block, far from its initial values, in evaluation; further arguments."""
    torch.manual_seed(4)
    made, extra = CASES[case]()
    holder = made if hasattr(made, "layer") else nn.Sequential(made)
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return holder.eval(), extra


def block_of(holder: Any) -> Any:
    if hasattr(holder, "layer"):
        names = ("Layer",)
        return next(m for m in holder.modules() if type(m).__name__.endswith(names))
    return holder[0]


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(5)).to(dtype)


@torch.no_grad()
def output(holder: Any, extra: tuple[Any, ...], x: Tensor, autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block_of(holder)(x, *extra)
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, mode: str, ran: list[Any]) -> None:
    plain, extra = build(case)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    x = tokens(dtype)
    exact = output(copy.deepcopy(plain).double(), extra, x.double())
    plain.to(dtype)
    eager = output(plain, extra, x, mode == "autocast")
    source = type(block_of(plain))
    state = list(plain.state_dict())
    report = kdfast.accelerate(plain)
    assert len(report.blocks) >= (2 if case not in OWN else 0)
    assert bool(report.blocks_left) == (case in OWN)
    assert list(plain.state_dict()) == state
    block = block_of(plain)
    assert isinstance(block, source) and type(block).__name__ == source.__name__
    for _ in range(2):
        fused = output(plain, extra, x, mode == "autocast")
        assert fused.dtype == eager.dtype
        eps = torch.finfo(torch.float32 if mode == "fp32" else torch.bfloat16).eps
        assert_no_worse(f"{case} {mode}", fused, exact, eager, eps=eps)
    assert (type(block) in ran) == (case not in OWN)
    assert kdfast.restore(plain) == report.count
    assert type(block_of(plain)) is source
    assert torch.equal(output(plain, extra, x, mode == "autocast"), eager)


@pytest.mark.parametrize("case", ["timm LayerScale", "EVA SwiGLU", "torchvision"])
@pytest.mark.parametrize("how", ["sliced", "transposed", "expanded"])
def test_strided_stream(case: str, how: str, ran: list[Any]) -> None:
    holder, extra = build(case)
    x = {
        "sliced": torch.randn(B, N + 3, 2 * C)[:, 3:, ::2],
        "transposed": torch.randn(N, B, C).transpose(0, 1),
        "expanded": torch.randn(1, N, C).expand(B, N, C),
    }[how]
    want = output(holder, extra, x)
    kdfast.accelerate(holder)
    before = x.clone()
    torch.testing.assert_close(output(holder, extra, x), want, rtol=1e-4, atol=1e-4)
    assert ran and torch.equal(x, before)


def test_stream_of_autocast_keeps_its_dtype() -> None:
    for case in ("timm", "timm LayerScale", "EVA"):
        holder, extra = build(case)
        x = tokens(torch.bfloat16)
        want = output(holder, extra, x, autocast=True)
        kdfast.accelerate(holder)
        assert output(holder, extra, x, autocast=True).dtype == want.dtype, case


@pytest.mark.parametrize("case", ["timm LayerScale", "EVA SwiGLU", "torchvision", "ViT"])
def test_compile_and_export(case: str, ran: list[Any]) -> None:
    holder, extra = build(case)
    x = tokens()
    want = output(holder, extra, x)
    kdfast.accelerate(holder)
    block = block_of(holder)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    program = None
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, *extra), want, rtol=1e-4, atol=1e-4)
        if case != "ViT":
            program = torch.export.export(block, (x, *extra))
    if program is not None:
        assert "kdfast" not in str(program.graph) and "mkldnn" not in str(program.graph)
        torch.testing.assert_close(program.module()(x, *extra), want, rtol=1e-4, atol=1e-4)
    assert not ran


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_blocks(how: Callable[[Any], Any], ran: list[Any]) -> None:
    holder, _ = build("timm LayerScale")
    kdfast.accelerate(holder)
    want = output(holder, (), tokens())
    twin = how(holder)
    assert type(twin[0]) is type(holder[0])  # type: ignore[index]
    ran.clear()
    assert torch.equal(output(twin, (), tokens()), want)
    assert type(twin[0]) in ran
    with torch.no_grad():
        holder[0].mlp.fc1.weight.zero_()  # type: ignore[index]
    assert torch.equal(output(twin, (), tokens()), want)
    kdfast.restore(twin)
    assert type(twin[0]) is Block


def test_pickles_load_in_another_process(tmp_path: Any) -> None:
    holder, _ = build("timm LayerScale")
    kdfast.accelerate(holder)
    torch.save((holder, tokens(), output(holder, (), tokens())), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, want = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)\n"
        "print(type(model[0]).__mro__[:2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("timm.models.vision_transformer.Block") == 2


def test_policies_by_class_find_blocks() -> None:
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    holder, _ = build("timm")
    kdfast.accelerate(holder)
    block = holder[0]  # type: ignore[index]
    names = {type(m).__name__ for m in holder.modules()}
    assert {"Block", "Mlp"} <= names and isinstance(block, Block)
    assert transformer_auto_wrap_policy(block, False, 1, {Block})
    assert qualified_name(block) == "timm.models.vision_transformer.Block"


@pytest.mark.parametrize("kept", [[0, 2, 5], []], ids=str)
@pytest.mark.parametrize("case", ["timm LayerScale", "EVA SwiGLU", "torchvision"])
def test_removed_heads(case: str, kept: list[int], ran: list[Any]) -> None:
    holder, extra = build(case)
    kdfast.accelerate(holder)
    block = block_of(holder)
    output(holder, extra, tokens())
    attn = block.self_attention if case == "torchvision" else block.attn
    attn.keep_heads(kept)
    ran.clear()
    got = output(holder, extra, tokens())
    # The block, or at least its MLP, which has lost nothing.
    assert (type(block) in ran) == bool(kept) and ran
    want = block(tokens(), *extra).detach()  # with gradients: the block's own code
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_orions_eva(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdfast.models import eva_layers

    model: Any = small_eva(embed_dim=96, num_heads=3).eval()
    x = torch.randn(2, 3, 96, 96)

    def features(model: Any, x: Tensor) -> Tensor:
        out: Any = model(x)
        while not isinstance(out, Tensor):
            out = out[0] if isinstance(out, (tuple, list)) else next(iter(out.values()))
        return out

    counted: list[int] = []
    real = eva_layers.Block._infer
    monkeypatch.setattr(eva_layers.Block, "_infer", lambda *args: counted.append(1) or real(*args))
    exact = features(copy.deepcopy(model).double(), x.double()).detach()
    model.to(dtype)
    eager = features(model, x.to(dtype)).detach()
    assert not counted  # gradients are on
    with torch.no_grad():
        assert_no_worse("EVA", features(model, x.to(dtype)), exact, eager)
    assert len(counted) == 3
    model.requires_grad_(False).blocks[1].norm2.requires_grad_(True)
    features(model, x.to(dtype)).float().sum().backward()
    assert model.blocks[1].norm2.weight.grad is not None
    counted.clear()
    with torch.no_grad():
        model.blocks[0].mlp.register_forward_hook(lambda *_: None)
        features(model, x.to(dtype))
    assert len(counted) == 2


def test_what_transformers_records(ran: list[Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=C, intermediate_size=2 * C, num_hidden_layers=2, num_attention_heads=HEADS,
        image_size=64, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    x = torch.randn(B, 3, 64, 64)
    with torch.no_grad():
        want = model(x, output_hidden_states=True)
        kdfast.accelerate(model)
        got = model(x, output_hidden_states=True)
        assert [cls.__name__ for cls in ran] == ["ViTMLP"] * 2
        ran.clear()
        model(x, output_attentions=True)
        assert [cls.__name__ for cls in ran] == ["ViTMLP"] * 2
        ran.clear()
        model(x)  # transformers leaves its recorder on the attentions
        assert [cls.__name__ for cls in ran] == ["ViTLayer"] * 2
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for one, other in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_mlps_alone(ran: list[Any]) -> None:
    for mlp in (Block(C, HEADS).mlp, GluMlp(C, 2 * C, act_layer=nn.SiLU)):
        holder = nn.Sequential(mlp).eval()
        x = tokens()
        with torch.no_grad():
            want = holder(x)
            assert len(kdfast.accelerate(holder).blocks) == 1
            torch.testing.assert_close(holder(x), want, rtol=1e-4, atol=1e-4)
        assert type(mlp) in ran
        torch.testing.assert_close(holder(x).detach(), want, rtol=1e-4, atol=1e-4)


def test_drop_path_is_known() -> None:
    assert block_module.inert(DropPath(0.5).eval(), nn.Identity(), nn.Dropout(0.3).eval())
    assert not block_module.inert(DropPath(0.5))
    assert not block_module.inert(nn.Dropout(0.3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_layers_are_left(ran: list[Any]) -> None:
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    holder, _ = build("timm")
    quantized = quantize(copy.deepcopy(holder), {nn.Linear}, dtype=torch.qint8)
    x = tokens()
    want = output(quantized, (), x)
    report = kdfast.accelerate(quantized)
    assert not report.layers
    torch.testing.assert_close(output(quantized, (), x), want, rtol=1e-3, atol=1e-3)
    assert not ran
