# SPDX-License-Identifier: Apache-2.0
"""The report of accelerate against what is in truth called, for every family that it knows."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdfast
from kdfast.nn import FusedAttention, attention, block_table, pool, torch_attention
from kdfast.nn import block as block_module
from kdfast.nn import transformers_attention as interface
from tests.test_accelerate_registry import SAMPLE, small

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.usefixtures("ran")
# Where the functions that run fused are looked up, by the attention that asks for them.
OPS = (
    (attention, "self_attention"),
    (block_table, "self_attention"),
    (interface, "self_attention"),
    (pool, "folded_attention"),
    (torch_attention, "folded_attention"),
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[nn.Module]:
    """The attentions that asked for a fused function, and the blocks that ran fused."""
    seen: set[nn.Module] = set()

    def spy(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            frame: Any = sys._getframe(1)
            while frame is not None:
                names = [frame.f_locals.get(name) for name in ("self", "module", "attn")]
                owner = next((x for x in names if isinstance(x, nn.Module)), None)
                if isinstance(owner, FusedAttention) or "Attention" in type(owner).__name__:
                    seen.add(owner)  # type: ignore[arg-type]
                    break
                frame = frame.f_back
            return real(*args, **kwargs)

        return called

    for place, name in OPS:
        monkeypatch.setattr(place, name, spy(getattr(place, name)))
    real = block_module.packed

    def packed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        products = real(module, *args, **kwargs)
        if products is not None:
            seen.add(module)
        return products

    monkeypatch.setattr(block_module, "packed", packed)
    monkeypatch.setattr(block_module, "enough_work", lambda *_: True)
    return seen


def check(model: nn.Module, call: Callable[[nn.Module], Any], asked: set[nn.Module]) -> Any:
    """Accelerates, calls and compares: every row of the report is what happened."""
    report = kdfast.accelerate(model.eval())
    with torch.no_grad():
        call(model)
    for row in report.replaced:
        assert model.get_submodule(row.name) in asked, f"called fused, never was: {row}"
    for row in report.left:
        assert model.get_submodule(row.name) not in asked, f"called left, but fused: {row}"
    ran = {name for name, module in model.named_modules() if module in asked}
    for row in report.blocks:
        above = {row.name.rsplit(".", n)[0] for n in range(row.name.count(".") + 1)}
        assert above & ran, f"called fused in inference, never was: {row}"
    for row in report.blocks_left:
        assert row.name not in ran, f"called left, but fused: {row}"
    return report


@pytest.mark.parametrize("name", SAMPLE)
def test_timm(name: str, asked: set[nn.Module]) -> None:
    model, x = small(name)
    check(model.float(), lambda m: m(x.float()), asked)


HF: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("ViT", "DeiT", "IJepa", "ViTMAE", "ViTMSN", "Dinov2", "Dinov2WithRegisters", "Beit",
         "DINOv3ViT", "CLIPVision", "SiglipVision", "Data2VecVision"),
        {"image_size": 32, "patch_size": 8},
    ),
    "Siglip2Vision": {"num_patches": 16, "patch_size": 2},
    "GroupViTVision": {"image_size": 32, "patch_size": 4},
    "Swin": {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1],
             "num_heads": [2, 4], "window_size": 4},
    "Swinv2": {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1],
               "num_heads": [2, 4], "window_size": 4},
    "ConvNext": {"image_size": 32, "patch_size": 4},
}  # fmt: skip
WIDTH = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", HF)
def test_transformers(name: str, asked: set[nn.Module]) -> None:
    transformers = pytest.importorskip("transformers")
    options = HF[name] if "depths" in HF[name] or name == "ConvNext" else {**WIDTH, **HF[name]}
    if name == "GroupViTVision":
        options = {**options, "depths": [1, 1, 1], "num_group_tokens": [0, 4, 0],
                   "num_output_groups": [0, 4, 0]}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config)
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    if name == "Siglip2Vision":
        inputs = {
            "pixel_values": torch.randn(1, 16, 12),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]]),
        }
    report = check(model, lambda m: m(**inputs), asked)
    if name == "Siglip2Vision":
        assert "without a padding mask" in report.replaced[0].detail


def test_torchvision(asked: set[nn.Module]) -> None:
    vision = pytest.importorskip("torchvision.models")
    vit = vision.VisionTransformer(32, 8, 2, 2, 32, 48)
    check(vit, lambda m: m(torch.randn(1, 3, 32, 32)), asked)
    swin = vision.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4])
    check(swin, lambda m: m(torch.randn(1, 3, 32, 32)), asked)


def test_a_padding_mask_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the module's name; and the report does not call it simply fused."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("kdfast.nn.attention._warned", set())
    config = transformers.Siglip2VisionConfig(**WIDTH, num_patches=16, patch_size=2)
    model = transformers.Siglip2VisionModel(config).eval()
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, 12:] = 0
    args = (torch.randn(1, 16, 12), mask, torch.tensor([[3, 4]]))
    with torch.no_grad():
        want = model(*args).last_hidden_state
        report = kdfast.accelerate(model)
        assert all("without a padding mask" in row.detail for row in report.replaced)
        with pytest.warns(kdfast.FallbackWarning) as said:
            got = model(*args).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    messages = [str(w.message) for w in said]
    assert len(messages) == 2  # one for each class of attention
    assert "cannot run a mask (first in encoder.layers.0.self_attn)" in messages[0]
    assert "cannot run a mask (first in head.attention)" in messages[1]


def test_torchs_encoder_layer_has_a_path_of_its_own() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
    detail = kdfast.accelerate(nn.Sequential(layer)).replaced[0].detail
    assert "no faster path of its own" in detail and "without a padding mask" in detail


def test_a_subclass_of_a_fused_attention_is_no_liar(asked: set[nn.Module]) -> None:
    class Never(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x

    holder = nn.Sequential(Never(16, 2))
    check(holder, lambda m: m(torch.randn(1, 3, 16)), asked)
    assert not any(isinstance(m, FusedAttention) for m in holder.modules())
