# SPDX-License-Identifier: Apache-2.0
"""The README.md of a saved folder: what it says, and when it is replaced."""

import os
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

from kdfast.models import EVAViT
from kdfast.prune import main
from kdfast.pruning import prune_heads
from kdfast.pruning.card import CARD, is_foreign
from kdfast.pruning.saving import load_pretrained, save_pretrained

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}


def vit(**changes: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 7, **changes})


def card(folder: Path) -> str:
    return (folder / CARD).read_text(encoding="utf-8")


def front(text: str) -> dict[str, object]:
    """The front matter, as Hugging Face reads it."""
    _, matter, _ = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    found: dict[str, object] = yaml.safe_load(matter)
    return found


def test_a_pruned_model(tmp_path: Path) -> None:
    model = prune_heads(vit(), [[0, 2], [1]], mlp=[list(range(5)), list(range(9))])
    save_pretrained(model.bfloat16(), tmp_path, metrics={"top-1, %": 81.25, "data": "a | b\nc"})
    text = card(tmp_path)
    assert front(text) == {
        "library_name": "kdfast",
        "tags": ["kdfast", "vision-transformer", "timm", "pruned"],
    }
    assert "# vit_tiny_patch16_224, pruned\n" in text
    whole = sum(p.numel() for p in vit().parameters())
    left = sum(p.numel() for p in model.parameters())
    for row in (
        "| attention heads | 8 | 3 |",
        "| hidden units of MLPs | 192 | 14 |",
        f"| parameters | {whole:,} | {left:,} |",
        f"| model.safetensors |  | {2 * left / 1e6:.1f} MB, bfloat16 |",
        "| top-1, % | 81.25 |",
        "| data | a b c |",
    ):
        assert row in text.splitlines()
    assert "Heads of each block: 2, 1\\\nHidden units of each block: 5, 9" in text
    assert "kdfast.load_pretrained(" in text and "Images are 32 x 32,\nmean 0.5, 0.5, 0.5" in text
    assert "It claims no licence for these weights" in text and "license:" not in text


def test_a_whole_model(tmp_path: Path) -> None:
    save_pretrained(vit(), tmp_path)
    text = card(tmp_path)
    assert "pruned" not in text and "Metrics" not in text and "of each block" not in text
    assert "| attention heads | 8 | 8 |" in text


@pytest.mark.parametrize("family", ["EVAViT", "transformers", "torchvision"])
def test_families(tmp_path: Path, family: str) -> None:
    if family == "EVAViT":
        sizes = {**SMALL, "embed_dim": 32, "pt_hw_seq_len": 4, "pretrain_img_size": 32}
        model: nn.Module = EVAViT(**sizes, with_cp=False)
    elif family == "transformers":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    else:
        from torchvision.models import VisionTransformer

        model = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=3)
    save_pretrained(prune_heads(model, [[1], [0, 3]]), tmp_path)
    assert "| attention heads | 8 | 3 |" in card(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("README.md", "config.json", "model.safetensors"),
    ]


def test_only_our_own_card_is_replaced(tmp_path: Path) -> None:
    save_pretrained(vit(), tmp_path, metrics={"mIoU": 0.5})
    assert not is_foreign(tmp_path / CARD)
    save_pretrained(vit(), tmp_path, metrics={"mIoU": 0.75})
    assert "| mIoU | 0.75 |" in card(tmp_path)
    edited = card(tmp_path).replace("# vit_tiny", "# my vit_tiny")
    for other in (edited, "my words", "", b"\xff\xfe"):
        content = other if isinstance(other, bytes) else other.encode()
        (tmp_path / CARD).write_bytes(content)
        assert is_foreign(tmp_path / CARD)
        save_pretrained(vit(num_classes=3), tmp_path, metrics={"mIoU": 0.9})
        assert (tmp_path / CARD).read_bytes() == content
        assert load_pretrained(tmp_path).num_classes == 3
    (tmp_path / CARD).unlink()
    assert not is_foreign(tmp_path / CARD)


def test_the_command_writes_its_times_and_spares_a_foreign_card(tmp_path: Path) -> None:
    save_pretrained(vit(), tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--keep", "1"]
    words += ["--batches", "1", "--batch-size", "2", "--rounds", "2", "--overwrite"]
    assert main(words) == 0
    assert "| ms, pruned, fused | " in card(tmp_path / "out")
    (tmp_path / "out" / CARD).write_text("my words")
    assert main(words) == 0
    assert card(tmp_path / "out") == "my words"


def test_the_same_model_has_the_same_card(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_pretrained(vit(), tmp_path / "a")
    save_pretrained(load_pretrained(tmp_path / "a"), tmp_path / "b")
    assert card(tmp_path / "a") == card(tmp_path / "b")


def test_reading_ignores_it(tmp_path: Path) -> None:
    save_pretrained(vit(), tmp_path)
    (tmp_path / CARD).unlink()
    os.symlink("/nowhere", tmp_path / CARD)
    load_pretrained(tmp_path)
