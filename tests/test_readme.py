# SPDX-License-Identifier: Apache-2.0
"""The README's examples run as they stand, on a small model and small tensors."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import kdfast
from kdfast.models import EVAViT, load_backbone, save_backbone

README = Path(__file__).resolve().parents[1] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_drop_in_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(python_blocks()[0], scope)
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
    exec(python_blocks()[1], scope)
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
    exec(f"import kdfast\n{python_blocks()[2]}", scope)
    assert scope["x"].shape == (batch, tokens, 1024)
    assert scope["out"].transpose(1, 2).flatten(2).data_ptr() == scope["out"].data_ptr()
