# SPDX-License-Identifier: Apache-2.0
"""Blocks that lost all their heads: every parameter that had a gradient still has one."""

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kdfast
from kdfast.pruning.families import anatomy_of
from kdfast.testing.models import small_eva

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": dict(VIT, qk_norm=True),
    "vit_small_patch16_rope_mixed_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "beit_base_patch16_224": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "swinv2_cr_tiny_224": SWIN,
    "tiny_vit_5m_224": {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2),
                        "window_sizes": (4, 4)},
    "hiera_tiny_224": {"img_size": 64, "stages": (1, 2, 1, 1), "embed_dim": 16, "num_heads": 1},
    "davit_tiny": {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4)},
    "volo_d1_224": {"img_size": 64},
    "fastvit_sa12": {},
}  # fmt: skip
HUGGING_FACE = ("ViT", "Dinov2", "DINOv3ViT", "SiglipVision")


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "EVAViT":
        return small_eva(), torch.randn(2, 3, 96, 96)
    if name in HUGGING_FACE:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "image_size": 24, "patch_size": 8}  # fmt: skip
        config = getattr(transformers, f"{name}Config")(**sizes)
        return getattr(transformers, f"{name}Model")(config), torch.randn(2, 3, 24, 24)
    if name == "torchvision":
        vision = pytest.importorskip("torchvision.models")
        return vision.VisionTransformer(32, 8, 2, 3, 48, 64), torch.randn(2, 3, 32, 32)
    if name == "torchvision swin":
        swin = pytest.importorskip("torchvision.models.swin_transformer")
        sizes = ([4, 4], 32, [2], [2], [3, 3])
        return swin.SwinTransformer(*sizes, num_classes=5), torch.randn(2, 3, 32, 32)
    side = MODELS[name].get("img_size", 64)
    model = timm.create_model(name, num_classes=5, **MODELS[name])
    return model, torch.randn(2, 3, side, side)


def with_gradient(model: nn.Module, x: Tensor) -> set[str]:
    out = model(x)
    (out if isinstance(out, Tensor) else out[0]).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name", [*MODELS, *HUGGING_FACE, "torchvision", "torchvision swin", "EVAViT"]
)
def test_no_parameter_leaves_the_graph(name: str) -> None:
    model, x = made(name)
    want = with_gradient(model, x)
    model.zero_grad()
    blocks = len(anatomy_of("test", model).attentions)
    rest: list[list[int]] = [[0]] * (blocks - 1)
    for heads in ([[], *rest], [*rest, []], [[]] * blocks):
        pruned = kdfast.prune_heads(model, heads)
        assert with_gradient(pruned, x) == want & {n for n, _ in pruned.named_parameters()}
        with torch.no_grad():
            pruned.eval()(x)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ViT", "swin_tiny_patch4_window7_224"])
def test_distributed_steps(name: str, one_process: None) -> None:
    model, x = made(name)
    if name == "ViT":
        model.pooler = None  # type: ignore[assignment] # not part of the output that is compared
    blocks = len(anatomy_of("test", model).attentions)
    module = DistributedDataParallel(kdfast.prune_heads(model, [[], *[[0]] * (blocks - 1)]))
    for _ in range(2):
        with_gradient(module, x)


def test_gradients_are_those_of_silenced_heads() -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    pruned = kdfast.prune_heads(model, [[], [0, 1]])
    model.blocks[0].attn.proj.weight.data.zero_()
    for net in (model, pruned):
        with_gradient(net, x)
    mine, theirs = dict(model.named_parameters()), dict(pruned.named_parameters())
    for name in ("blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight"):
        torch.testing.assert_close(theirs[name].grad, mine[name].grad)
