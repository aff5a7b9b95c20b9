# SPDX-License-Identifier: Apache-2.0
"""Blocks without heads and hidden units make way for the vector that they add."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kdfast
from kdfast.models import EVAViT
from kdfast.pruning.constant import ConstantBlock, constant_blocks
from kdfast.pruning.families import anatomy_of
from tests.test_prune_families import small, torchvision_vit

EMPTY = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224")


def emptied(model: nn.Module, blocks: tuple[int, ...]) -> nn.Module:
    """The model with random vectors for biases and gains, and some blocks without anything."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.5)
    anatomy = anatomy_of("test", model)
    heads, units = (
        [[] if i in blocks else list(range(len(s.held))) for i, s in enumerate(sites)]
        for sites in (anatomy.attentions, anatomy.mlps)
    )
    return kdfast.prune_heads(model, heads, mlp=units)


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


@pytest.mark.parametrize("name", [*EMPTY, "torchvision"])
def test_dropped_blocks_are_exact(name: str, tmp_path: Path) -> None:
    model, x = torchvision_vit() if name == "torchvision" else small(name)
    pruned = emptied(model, (1,))
    want, params = output(pruned, x), sum(p.numel() for p in pruned.parameters())
    report = kdfast.drop_blocks(pruned)
    assert len(report.dropped) == 1 and not report.left
    assert constant_blocks(pruned).keys() == set(report.dropped)
    assert sum(p.numel() for p in pruned.parameters()) < params
    torch.testing.assert_close(output(pruned, x), want)
    assert pruned.training == model.training
    assert kdfast.drop_blocks(pruned) == ([], {})
    # Saved, loaded, fused and pruned further: the other blocks are those that are left.
    kdfast.save_pretrained(pruned, tmp_path / "model")
    again = kdfast.load_pretrained(tmp_path / "model")
    assert torch.equal(output(again, x), output(pruned, x))
    assert isinstance(again.get_submodule(report.dropped[0]), ConstantBlock)
    kdfast.accelerate(pruned)
    torch.testing.assert_close(output(pruned, x), want)
    anatomy = anatomy_of("test", pruned)
    fewer = kdfast.prune_heads(pruned, [[0]] * len(anatomy.attentions))
    assert all(len(site.held) == 1 for site in anatomy_of("test", fewer).attentions)


def test_hugging_face(tmp_path: Path) -> None:
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = library.ViTConfig(**sizes, intermediate_size=48, image_size=32, patch_size=8)
    x = torch.randn(2, 3, 32, 32)
    pruned = emptied(library.ViTModel(config).eval(), (0, 2))
    want = output(pruned, x)
    report = kdfast.drop_blocks(pruned)
    assert len(report.dropped) == 2 and not report.left
    torch.testing.assert_close(output(pruned, x), want)
    kdfast.save_pretrained(pruned, tmp_path)
    assert torch.equal(output(kdfast.load_pretrained(tmp_path), x), output(pruned, x))


def test_eva_adds_the_constant_by_itself(tmp_path: Path) -> None:
    model = EVAViT(img_size=32, embed_dim=24, depth=3, num_heads=2, pretrain_img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    pruned = emptied(model, (0, 2))
    with torch.enable_grad():
        want = pruned(x)  # layer by layer
    (want * want).sum().backward()
    assert pruned.blocks[0].mlp.w3.bias.grad is not None
    report = kdfast.drop_blocks(pruned)
    assert not report.dropped and list(report.left) == ["blocks.0", "blocks.2"]
    assert "by itself" in report.left["blocks.0"]
    torch.testing.assert_close(output(pruned, x), want.detach())
    pruned.blocks[0].mlp.register_forward_hook(lambda *_: None)
    assert not pruned.blocks[0].adds_constant and pruned.blocks[2].adds_constant
    compiled = torch.compile(pruned, backend="eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, x), want.detach())
    kdfast.save_pretrained(pruned, tmp_path)
    torch.testing.assert_close(output(kdfast.load_pretrained(tmp_path), x), want.detach())


def test_flags_gradients_and_types_stay() -> None:
    model, x = small("vit_tiny_patch16_224")
    pruned = emptied(model, (0,)).to(torch.bfloat16).train()
    for parameter in pruned.blocks[0].parameters():
        parameter.requires_grad_(False)
    kdfast.drop_blocks(pruned, x.to(torch.bfloat16))
    constant = pruned.blocks[0]
    assert constant.training and not constant.bias.requires_grad
    assert constant.bias.dtype == torch.bfloat16
    other = emptied(small("vit_tiny_patch16_224")[0], (1,))
    kdfast.drop_blocks(other)
    output = other(x)
    output.square().sum().backward()
    assert other.blocks[1].bias.grad.abs().sum() > 0


class Odd(nn.Module):
    """A block that does more than add a constant once its branches are empty."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp = block.attn, block.mlp
        self.factor = 2.0
        self.pair = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.factor * x + self.attn(x) + self.mlp(x)
        return (out, None) if self.pair else out


@pytest.mark.parametrize(
    ("pair", "reason"), [(False, "does more than to add one vector"), (True, "returns a tuple")]
)
def test_other_blocks_stay(pair: bool, reason: str) -> None:
    model, x = small("vit_tiny_patch16_224")
    pruned: Any = emptied(model, (1,))
    pruned.blocks[1] = Odd(pruned.blocks[1])
    pruned.blocks[1].pair = pair
    if pair:
        pruned.norm = nn.Sequential(First(), pruned.norm)
    want = output(pruned, x)
    report = kdfast.drop_blocks(pruned)
    assert not report.dropped and reason in report.left["blocks.1"]
    assert torch.equal(output(pruned, x), want)


class First(nn.Module):
    def forward(self, x: Any) -> Any:
        return x[0] if isinstance(x, tuple) else x


def test_files_that_lie(tmp_path: Path) -> None:
    model, _ = small("vit_tiny_patch16_224")
    pruned = emptied(model, (1,))
    kdfast.drop_blocks(pruned)
    kdfast.save_pretrained(pruned, tmp_path)
    assert "blocks.1.bias" in load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (width,) = config["kdfast"]["constant"].values()
    for wrong in ({"blocks.9": width}, {"": width}, {"blocks.1": 10**12}, {"blocks.1": "64"}):
        config["kdfast"]["constant"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="must name blocks of the arch|at most 1,048,576"):
            kdfast.load_pretrained(tmp_path, verify=False)


def test_errors() -> None:
    with pytest.raises(TypeError, match="drop_blocks: model must be one of"):
        kdfast.drop_blocks(nn.Linear(2, 2))
    pruned = emptied(small("vit_tiny_patch16_224")[0], (0,))
    with pytest.raises(TypeError, match="drop_blocks: a batch must be"):
        kdfast.drop_blocks(pruned, "picture")


def test_a_branch_without_units_runs_fused() -> None:
    """oneDNN cannot pack a layer without channels: such a block runs its own code."""
    model = timm.create_model("vit_small_patch16_224", depth=1, num_classes=3).eval()
    x = torch.randn(1, 3, 224, 224)
    for heads, units in ((6, 0), (0, 1536), (2, 32)):
        pruned = kdfast.prune_heads(model, [list(range(heads))], mlp=[list(range(units))])
        want = output(pruned, x)
        kdfast.accelerate(pruned)
        torch.testing.assert_close(output(pruned, x), want, rtol=1e-4, atol=1e-4)
