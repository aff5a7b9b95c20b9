# SPDX-License-Identifier: Apache-2.0
"""How pruning finds a model's attentions and resizes its tensors, and which models it refuses."""

import pytest
import timm
import torch
from torch import nn

from kdfast.nn import FusedAttention
from kdfast.nn.heads import find_tensor, resize
from kdfast.pruning import head_scores, prune_heads


def test_attentions_are_listed_once_for_the_model_and_once_for_the_pruned_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=4, img_size=32, num_classes=3
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    adopted: list[nn.Module] = []
    adopt = FusedAttention.adopt.__func__  # type: ignore[attr-defined]

    def counted(cls: type, original: nn.Module, backend: str | None = None) -> object:
        adopted.append(original)
        return adopt(cls, original, backend)

    monkeypatch.setattr(FusedAttention, "adopt", classmethod(counted))
    blocks = len(model.blocks)
    prune_heads(model, [[0]] * blocks)
    # One more: the first attention tells the family.
    assert len(adopted) == 2 * blocks + 1
    adopted.clear()
    head_scores(model, "taylor", [x], progress=False)
    assert len(adopted) == blocks + 1


def test_resize_brings_the_sizes_up_to_date() -> None:
    layers = nn.ModuleDict(
        {"fc": nn.Linear(4, 6), "conv": nn.Conv2d(4, 6, 1), "n": nn.LayerNorm(4)}
    )
    layers["fc"].weight.requires_grad_(False)
    for name, shape in (("fc", (3, 2)), ("conv", (3, 2, 1, 1)), ("n", (2,))):
        slot = find_tensor(layers, f"{name}.weight")
        assert slot is not None and slot.owner is layers[name]
        resize(slot, torch.ones(shape))
    assert (layers["fc"].in_features, layers["fc"].out_features) == (2, 3)
    assert (layers["conv"].in_channels, layers["conv"].out_channels) == (2, 3)
    assert layers["n"].normalized_shape == (2,)
    assert not layers["fc"].weight.requires_grad and layers["conv"].weight.requires_grad
    assert find_tensor(layers, "fc.none") is None and find_tensor(layers, "no.weight") is None


def test_unsupported_models_are_named() -> None:
    with pytest.raises(TypeError, match="PyramidVisionTransformerV2.*pvt_v2.Attention: its keys"):
        prune_heads(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), [[0]])
    with pytest.raises(TypeError, match="got timm.models.resnet.ResNet, which holds no attention"):
        prune_heads(timm.create_model("resnet18"), [[0]])
    with pytest.raises(TypeError, match="it is the model itself, which nothing holds"):
        prune_heads(timm.layers.Attention(32, 4), [[0]])


def test_text_towers_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**tower, "num_attention_heads": 4, "vocab_size": 64},
        vision_config={**tower, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    )
    model = transformers.CLIPModel(config)
    with pytest.raises(TypeError, match="it has a text model as well; give its vision model"):
        prune_heads(model, [[0], [0]])
