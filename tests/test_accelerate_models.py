# SPDX-License-Identifier: Apache-2.0
"""accelerate on whole models: torchvision and transformers from tiny configs, timm's registry."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.models import beit, tiny_vit
from torch import Tensor, nn

import kdfast
from kdfast.nn import TorchMultiheadAttention, register_transformers, transformers_attention
from kdfast.nn.table import FUSED

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 24, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The first output, and the gradients of a random projection of it."""
    torch.manual_seed(3)
    out = model(**inputs)
    out = out[0] if not isinstance(out, Tensor) else out
    model.zero_grad()
    # Not a norm: after a final LayerNorm its gradient is zero and only noise is compared.
    (out * torch.randn(out.shape)).mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), *grads]


def compare(model: nn.Module, inputs: dict[str, Tensor]) -> kdfast.AccelerateReport:
    """Accelerates a copy; same outputs and gradients, forth and back."""
    # In fp64, where the kernel runs too: whole models amplify rounding without bound.
    model = model.double()
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    want = outputs(model, inputs)
    fused = copy.deepcopy(model)
    report = kdfast.accelerate(fused)
    got = outputs(fused, inputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert kdfast.restore(fused) == report.count
    for ours, theirs in zip(outputs(fused, inputs), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    return report


def hugging_face(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**{**TINY, **options})
    return getattr(transformers, f"{name}Model")(config), {
        "pixel_values": torch.randn(2, 3, 24, 24)
    }


@pytest.mark.parametrize(
    "name",
    ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "IJepa", "ViTMAE", "ViTMSN"],
)
def test_transformers_backbones(name: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = hugging_face(name)
    report = compare(model, inputs)
    assert report.complete and len(report.replaced) == 2
    assert {site.detail for site in report.replaced} == {'attn_implementation="kdfast"'}


@pytest.mark.parametrize("name", ["CLIPVision", "SiglipVision"])
def test_transformers_vision_towers(name: str) -> None:
    model, inputs = hugging_face(name)
    report = compare(model, inputs)
    # SigLIP pools by a torch.nn.MultiheadAttention with one learned query.
    assert report.complete and len(report.replaced) == (2 if name == "CLIPVision" else 3)


@pytest.mark.parametrize("how", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_transformers_beit(how: str) -> None:
    model, inputs = hugging_face("Beit", **{how: True})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_()
    report = compare(model, inputs)
    assert report.complete and len(report.replaced) == 2
    assert compare(*hugging_face("Beit")).complete


def test_transformers_swin(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4
    )
    given: list[Any] = []
    real = transformers_attention.self_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        given.append(kwargs["bias"].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers_attention, "self_attention", spy)
    model = transformers.SwinModel(config)
    report = compare(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert report.complete and len(report.replaced) == 3
    # The second block is shifted: one bias for every window of every image.
    assert given[:3] == [(1, 2, 16, 16), (32, 2, 16, 16), (1, 4, 16, 16)]


def test_pickled_transformers_models_run_in_another_process(tmp_path: Path) -> None:
    model, _ = hugging_face("ViT")
    kdfast.accelerate(model.eval())
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    torch.save(model, whole)
    torch.save(model.layers[0].attention, part)  # type: ignore[union-attr,index]
    x, tokens = torch.ones(1, 3, 24, 24), torch.ones(1, 5, 32)
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "load = lambda path: torch.load(path, weights_only=False)\n"
        "print(float(load(sys.argv[2])(torch.ones(1, 5, 32))[0].sum()))\n"
        "print(float(load(sys.argv[1])(torch.ones(1, 3, 24, 24))[0].sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(whole), str(part)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    with torch.no_grad():
        want = [model.layers[0].attention(tokens)[0].sum(), model(x)[0].sum()]  # type: ignore[union-attr,index]
    got = torch.tensor([float(line) for line in done.stdout.split()])
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-3)
    kdfast.restore(copy.deepcopy(model))


def test_transformers_data2vec_is_left() -> None:
    model, _ = hugging_face("Data2VecVision", use_relative_position_bias=True)
    assert not kdfast.accelerate(model).replaced


@pytest.mark.filterwarnings("ignore::kdfast.FallbackWarning")
def test_transformers_dropout_is_fused_in_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.nn.attention._warned", set())
    model, inputs = hugging_face("ViT", attention_probs_dropout_prob=0.1)
    plain = copy.deepcopy(model)
    report = kdfast.accelerate(model)
    assert report.complete
    assert report.replaced[0].detail.endswith('"kdfast", in eval (attention dropout 0.1)')
    with torch.no_grad():  # a fallback would be an error here
        want = plain.eval()(**inputs)[0]
        torch.testing.assert_close(model.eval()(**inputs)[0], want, rtol=1e-4, atol=1e-5)
        with pytest.warns(kdfast.FallbackWarning, match=r"dropout 0.1 \(first in layers.0"):
            assert not torch.allclose(model.train()(**inputs)[0], want)


def test_transformers_clip_leaves_the_text_tower() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=TINY, projection_dim=16)
    model = transformers.CLIPModel(config)
    inputs = {
        "input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "pixel_values": torch.randn(2, 3, 24, 24),
    }
    report = compare(model, inputs)
    assert {site.name.split(".")[0] for site in report.replaced} == {"vision_model"}
    assert {site.name.split(".")[0] for site in report.left} == {"text_model"}
    assert "not part of a vision tower" in report.left[0].detail


def test_transformers_llava() -> None:
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(**TINY)
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=49, image_seq_length=9
    )
    model = transformers.LlavaForConditionalGeneration(config)
    tokens = torch.tensor([[1, *[49] * 9, 5, 6]])
    report = compare(model, {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 24, 24)})
    assert len(report.replaced) == 2 and all("vision_tower" in s.name for s in report.replaced)
    assert len(report.left) == 2 and all("language_model" in s.name for s in report.left)


def test_transformers_by_name_runs_the_kernel_and_masks_run_sdpa(monkeypatch: Any) -> None:
    """Built with attn_implementation="kdfast": causal text calls still give what sdpa gives."""
    transformers = pytest.importorskip("transformers")
    register_transformers()
    calls: list[int] = []
    real = transformers_attention.self_attention
    monkeypatch.setattr(
        transformers_attention,
        "self_attention",
        lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs),
    )
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval()
    vit = transformers.ViTModel(transformers.ViTConfig(**TINY)).eval()
    pixels, ids = torch.randn(1, 3, 24, 24), torch.tensor([[1, 5, 6, 2]])
    want = text(ids)[0], vit(pixels)[0]
    for model in (text, vit):
        model.set_attn_implementation("kdfast")
    torch.testing.assert_close(text(ids)[0], want[0])
    assert not calls
    torch.testing.assert_close(vit(pixels)[0], want[1])
    assert len(calls) == 2


STAGES = {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4)}
RESIZED: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {**STAGES, "img_size": 56},
    "swinv2_tiny_window8_256": {**STAGES, "img_size": 64},
    "swinv2_cr_tiny_ns_224": {**STAGES, "img_size": 64},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32},
    "vit_relpos_small_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32},
}


@pytest.mark.parametrize("name", RESIZED)
def test_timm_image_size_changes_after(name: str) -> None:
    """Tables of positions are resized through the stand-in as through the original, and back."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **RESIZED[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = copy.deepcopy(model)
    assert kdfast.accelerate(model).complete
    for side in (96, 128):
        for each in (plain, model):
            size = {"window_size": (6, 6)} if "swin" in name else {}
            each.set_input_size((side, side), **size)
        x = torch.randn(2, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)
    kdfast.restore(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_tiny_vit_is_restored_without_a_stale_bias() -> None:
    attn = tiny_vit.Attention(16, 8, 2, 1, (3, 3))
    holder, x = nn.Sequential(attn).eval(), torch.randn(1, 9, 16)
    holder(x)
    kdfast.accelerate(holder)
    with torch.no_grad():
        attn.attention_biases.normal_()
    want = holder(x)
    kdfast.restore(holder)
    torch.testing.assert_close(holder(x), want)


def test_biases_are_fused_on_cuda_too() -> None:
    class OnCuda(beit.Attention):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([SimpleNamespace(device=torch.device("cuda"))])

    for source in ("timm.models.beit.Attention", "timm.models.swin_transformer.WindowAttention"):
        assert FUSED[source].why_not(OnCuda(16, 2)) is None


def vit_of_torchvision(**options: Any) -> nn.Module:
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    size = {"image_size": 24, "patch_size": 8, "num_layers": 2, "num_heads": 2}
    model = vision.VisionTransformer(**size, hidden_dim=32, mlp_dim=48, num_classes=7, **options)
    nn.init.normal_(model.heads[-1].weight)
    return model


def test_torchvision_swin() -> None:
    vision = pytest.importorskip("torchvision.models.swin_transformer")
    sizes = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": [3, 3]}
    for block in (vision.SwinTransformerBlock, vision.SwinTransformerBlockV2):
        merge = vision.PatchMerging if block is vision.SwinTransformerBlock else None
        model = vision.SwinTransformer(
            [4, 4], **sizes, num_classes=5, block=block, stochastic_depth_prob=0.0,
            downsample_layer=merge or vision.PatchMergingV2,
        )  # fmt: skip
        report = compare(model, {"x": torch.randn(2, 3, 32, 32)})
        assert report.complete and len(report.replaced) == 3
    model.features[1][0].attn.attention_dropout = 0.1
    assert kdfast.accelerate(model).replaced[0].detail.endswith("in eval (attention dropout 0.1)")


def test_torchvision() -> None:
    model = vit_of_torchvision()
    x = {"x": torch.randn(2, 3, 24, 24)}
    assert compare(model, x).complete
    model.float().eval()
    with torch.no_grad():  # torch's native fast path, which is another code
        want = model(**x)
        assert kdfast.accelerate(model).complete
        torch.testing.assert_close(model(**x), want, rtol=1e-4, atol=1e-5)
    dropping = vit_of_torchvision(attention_dropout=0.1)
    assert "in eval (attention dropout 0.1)" in kdfast.accelerate(dropping).replaced[0].detail


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.nn.attention._warned", set())
    torch.manual_seed(0)
    holder = nn.Sequential(nn.MultiheadAttention(24, 3, batch_first=batch_first))
    nn.init.normal_(holder[0].in_proj_bias)
    x, few = torch.randn(4, 5, 24), torch.randn(4, 5, 24)
    few = few[:, :2] if batch_first else few[:2]
    mask = torch.zeros(5, 5) if batch_first else torch.zeros(4, 4)
    mask[0, 1] = -1e9

    def calls() -> list[Tensor]:
        attn = holder[0]
        pooled, weights = attn(few, x, x)
        per_head = attn(few, x, x, average_attn_weights=False)[1]
        plain, none = attn(x, x, x, need_weights=False)
        assert none is None
        return [plain, pooled, weights, per_head]

    want = calls()
    weighted, masked = holder[0](x, x, x), holder[0](x, x, x, attn_mask=mask, need_weights=False)
    assert kdfast.accelerate(holder).complete
    assert type(holder[0]) is TorchMultiheadAttention
    for ours, theirs in zip(calls(), want, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.warns(kdfast.FallbackWarning, match="attention weights that are asked for"):
        torch.testing.assert_close(holder[0](x, x, x), weighted)
    with pytest.warns(kdfast.FallbackWarning, match="cannot run a mask"):
        out = holder[0](x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(out[0], masked[0])

    weight = torch.zeros(3, 1)
    weight[[0, 2]] = 1
    attn = holder[0]
    hook = attn.out_proj.register_forward_pre_hook(
        lambda _, args: (args[0].unflatten(-1, (3, -1)) * weight).flatten(-2)
    )
    want_pruned = attn(x, x, x, need_weights=False)[0]
    hook.remove()
    attn.keep_heads([0, 2])
    torch.testing.assert_close(attn(x, x, x, need_weights=False)[0], want_pruned)
    with pytest.raises(NotImplementedError, match="after heads were removed"):
        attn(x, x, x)
    attn.keep_heads([])
    bias = attn.out_proj.bias.expand_as(x)
    torch.testing.assert_close(attn(x, x, x, need_weights=False)[0], bias)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 5}, "another width than queries"),
        ({"add_bias_kv": True}, "adds tokens to keys and values"),
        ({"add_zero_attn": True}, "adds tokens to keys and values"),
    ],
)
def test_multihead_attention_left(options: dict[str, Any], reason: str) -> None:
    holder = nn.Sequential(nn.MultiheadAttention(8, 2, **options))
    assert reason in kdfast.accelerate(holder).left[0].detail
