# SPDX-License-Identifier: Apache-2.0
"""Links of a chain that are not timm's names: folders, torchvision, Hugging Face, files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from kdfast.chain import run as chain_run
from kdfast.chain.links import Link, build_link, described_link
from kdfast.chain.planning import chain_steps, check_links
from kdfast.configs import ChainConfig, ConfigError, load
from kdfast.data.labelled import build_classification
from kdfast.pruning import prune_heads
from kdfast.pruning.saving import save_pretrained
from kdfast.resolve import load_model
from kdfast.train import main

VIT: dict[str, Any] = {
    "img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2,
}  # fmt: skip
ARGS = "{img_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}"


def link(model: str, **changes: Any) -> Link:
    return replace(Link(0, "teacher", model, {}, "scratch", 1, False), **changes)


def config(*changes: str) -> ChainConfig:
    made = load("vit_chain_digits", ["batch=8", *changes])
    assert isinstance(made, ChainConfig)
    return made


@pytest.fixture
def half(tmp_path: Path) -> Path:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT).eval()
    return save_pretrained(prune_heads(model, [[1], [0]]), tmp_path / "half")


def test_a_pruned_folder_starts_from_its_weights(half: Path) -> None:
    saved, made = load_model(str(half)), build_link(link(str(half)), 4)
    assert made.training and made(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    own = made.net.state_dict()
    for name, x in saved.state_dict().items():
        assert name.startswith("head.") or torch.equal(own[name], x)
    assert link(str(half)).folder == "from_checkpoint"
    with pytest.raises(ConfigError, match="chain: teacher: .* takes no depth"):
        build_link(link(str(half), args={"depth": 3}), 4)


def test_hugging_face_and_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 16, "patch_size": 8, "num_labels": 3}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    model.save_pretrained(tmp_path / "hf")

    def build(*_: object, num_classes: int, **__: object) -> nn.Module:
        return torchvision.models.VisionTransformer(16, 8, 1, 2, 24, 32, num_classes=num_classes)

    monkeypatch.setattr(torchvision.models, "get_model", build)
    for name in (f"hf:{tmp_path / 'hf'}", "torchvision:vit_b_16"):
        made = build_link(link(name), 4)
        assert made.size == (16, 16)
        assert made(torch.rand(2, 3, 20, 20)).shape == (2, 4)
        assert described_link(link(name), made) is not None
    assert described_link(link("resnet18"), build_link(link("resnet18"), 4)) is None


def test_every_link_is_built_before_the_first_step(tmp_path: Path, half: Path) -> None:
    args = f"model_args=[{ARGS}]"
    two, bare = "epochs=6", ("model_args=[{}]", "epochs=6")
    with pytest.raises(ConfigError, match="chain: assistant: timm has no model 'vit_tiny_pach"):
        chain = "chain=[vit_tiny_patch16_224,vit_tiny_pach16_224,vit_tiny_patch16_224]"
        check_links(config(chain, args, two), 10)
    with pytest.raises(ConfigError, match="chain: student: there is no file or folder .*hal; did"):
        check_links(config(f"chain=[resnet18,{tmp_path}/hal]", "model_args=[{}]", two), 10)
    with pytest.raises(ConfigError, match="chain: student: .*nonsense"):
        chain = "chain=[resnet18,vit_tiny_patch16_224]"
        check_links(config(chain, "model_args=[{},{nonsense: 1}]", two), 10)
    name = next(n for n in timm.list_models("vit_*") if not timm.is_model_pretrained(n))
    with pytest.raises(ConfigError, match=f"student: timm has no pretrained weights of {name}"):
        text = "init=[scratch,pretrained]"
        check_links(config(f"chain=[resnet18,{name}]", "model_args=[{}]", text, two), 10)
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="init: .*w.pth does not fit resnet18"):
        check_links(
            config(f"chain=[{half},resnet18]", *bare, f"init=[scratch,{tmp_path}/w.pth]"), 10
        )
    check_links(config(f"chain=[{half},resnet18]", "model_args=[{}]", two), 10)
    # Only what the stage needs.
    chain = "chain=[vit_tiny_patch16_224,vit_tiny_patch16_224,nothing]"
    check_links(config(chain, args, two, "stage=assistant"), 10)


def test_a_saved_link_can_be_planned(half: Path) -> None:
    steps = chain_steps(config(f"chain=[{half},resnet18]", "model_args=[{}]", "epochs=6"), 10)
    assert steps[1].plan(2, False).tensors > 0


def test_a_chain_of_a_pruned_model_and_a_file(
    tmp_path: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are named plainly, and the checkpoint of a pruned link says what it is."""
    digits = build_classification("digits", size=16, seed=3, val_fraction=0.05, test_fraction=0.05)
    monkeypatch.setattr(chain_run, "read_data", lambda config, seed: digits)
    monkeypatch.setattr("kdfast.trainer.loop.draw_curves", lambda folder: None)
    for name in ("draw_curves", "draw_confusion", "draw_attention"):
        monkeypatch.setattr(f"kdfast.chain.summary.{name}", lambda *_: None)
    monkeypatch.setattr("kdfast.chain.compare.draw_comparison", lambda *_: None)
    sets = [f"output={tmp_path / 'run'}", "device=cpu", "epochs=1", "optim.warmup_epochs=0"]
    sets += ["twin=false", "seeds=[3]", "batch=8", "data.size=16", "data.limit=16"]
    sets += [f"chain=[{half}]", "model_args=[{}]"]
    words = [word for change in sets for word in ("--set", change)]
    assert main(["--config", "vit_chain_digits", *words]) == 0
    (best,) = (tmp_path / "run").rglob("best.pt")
    assert best.parent.parent == tmp_path / "run/from_checkpoint/digits/teacher"
    assert list(best.parent.parent.glob("logs/half_teacher_log.csv"))
    found: Any = load_model(str(best))
    assert [block.attn.heads for block in found.blocks] == [[1], [0]]
    assert found.num_classes == 10
    again = build_link(link(str(best)), 10)
    assert torch.equal(again.net.state_dict()["head.weight"], found.head.weight)
