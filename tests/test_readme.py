# SPDX-License-Identifier: Apache-2.0
"""The examples of README.md and of two pages run as they stand, on small models and tensors."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import kdfast
from kdfast.models import EVAViT, load_backbone, save_backbone

ROOT = Path(__file__).resolve().parents[1]


def python_block(page: str, holds: str) -> str:
    """The one block of Python in a page that holds a text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if holds in block)
    return str(block)


def test_drop_in_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(python_block("README.md", "kdfast.accelerate"), scope)
    small = kdfast.load_pretrained("vit_small_half").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(small(images), scope["small"].eval()(images))
    assert [block.attn.num_heads for block in small.blocks] == [3] * 12


def test_pruning_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = EVAViT(
        img_size=64,
        embed_dim=128,
        depth=3,
        num_heads=2,
        window_size=3,
        window_block_indexes=(0, 1),
    )
    save_backbone(model, tmp_path / "orion.safetensors", orion_keys=True)
    state = load_file(tmp_path / "orion.safetensors")
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "orion.pth")
    scope: dict[str, Any] = {}
    exec(python_block("docs/use/eva.md", "student.safetensors"), scope)
    assert [len(heads) for heads in load_backbone("student.safetensors").heads] == [1, 1, 1]


def test_attention_example() -> None:
    batch, tokens, heads = 2, 17, 16
    scope: dict[str, Any] = {
        "qkv": torch.randn(batch, tokens, 3 * heads * 64),
        "B": batch,
        "N": tokens,
        "cos": torch.randn(tokens - 1, 64),
        "sin": torch.randn(tokens - 1, 64),
        "proj": nn.Linear(3 * 64, 1024),
    }
    block = python_block("docs/ops/pruned_attention.md", "kdfast.Rope(cos, sin")
    exec(f"import kdfast\n{block}", scope)
    assert scope["x"].shape == (batch, tokens, 1024)
    assert scope["out"].transpose(1, 2).flatten(2).data_ptr() == scope["out"].data_ptr()
