# SPDX-License-Identifier: Apache-2.0
"""The way back into ORION: exported weights, and the backbone file that needs no kdfast."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kdfast import export_orion
from kdfast.models.checkpoint import load_orion_backbone
from kdfast.models.eva import EVAViT
from kdfast.pruning import prune_heads


def student(heads: list[list[int]], hidden: list[int] | None = None, **changes: Any) -> EVAViT:
    torch.manual_seed(0)
    model = EVAViT(
        **{
            "img_size": 80,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 4,
            "window_size": 4,
            "window_block_indexes": (0, 1),
            "pt_hw_seq_len": 4,
            "pretrain_img_size": 48,
            "heads": heads,
            "mlp_hidden": hidden,
            **changes,
        }
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kdfast_orion", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = {
    "half": student([[0, 2], [1, 3], [0, 1]]),
    "uneven": student([[0], [], [0, 1, 3]], [85, 40, 0]),
    "whole": student([[0, 1, 2, 3]] * 3, qkv_bias=False, use_abs_pos=False),
}


@pytest.mark.parametrize("name", CASES)
def test_adapter_computes_what_the_student_computes(name: str, tmp_path: Path) -> None:
    model = CASES[name].eval()
    weights, file = export_orion(model, tmp_path / "out.pth")
    other = module_at(file).PrunedEVAViT(str(weights), load=True).eval()
    # 56 is no multiple of the windows: their zero padding is attended.
    image = torch.randn(2, 3, 80, 56)
    with torch.no_grad():
        (got,) = other(image)
        torch.testing.assert_close(got, model(image), atol=2e-5, rtol=2e-5)


def test_adapter_trains_as_the_student(tmp_path: Path) -> None:
    model = CASES["half"].eval()
    weights, file = export_orion(model, tmp_path / "out.pth")
    other = module_at(file).PrunedEVAViT(str(weights), load=True)
    image = torch.randn(1, 3, 40, 40)
    other.train()
    other(image)[0].square().mean().backward()
    model.zero_grad()
    model(image).square().mean().backward()
    wanted = dict(model.named_parameters())
    for key, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, atol=1e-5, rtol=1e-3)


def test_adapter_imports_neither_kdfast_nor_flash_attention(tmp_path: Path) -> None:
    weights, file = export_orion(CASES["half"], tmp_path / "out.pth")
    code = (
        "import sys; sys.modules['kdfast'] = sys.modules['flash_attn'] = None\n"
        f"import kdfast_orion; kdfast_orion.PrunedEVAViT({str(weights)!r}, load=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=file.parent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_export_takes_the_rest_of_a_checkpoint_along(tmp_path: Path) -> None:
    model = student([[0, 1, 2, 3]] * 3)
    base = {"img_backbone.old": torch.ones(1), "pts_bbox_head.weight": torch.arange(3.0)}
    torch.save({"state_dict": base, "meta": {}}, tmp_path / "orion.pth")
    small = prune_heads(model, [[0, 1]] * 3)
    weights, _ = export_orion(small, tmp_path / "out.pth", tmp_path / "orion.pth")
    held = torch.load(weights, weights_only=True)["state_dict"]
    assert torch.equal(held["pts_bbox_head.weight"], torch.arange(3.0))
    assert "img_backbone.old" not in held
    again = load_orion_backbone(weights, **small.config)
    for key, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_export_refuses_what_is_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="EVAViT"):
        export_orion(nn.Linear(2, 2), tmp_path / "x.pth")  # type: ignore[arg-type]
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="img_backbone"):
        export_orion(CASES["half"], tmp_path / "x.pth", tmp_path / "other.pth")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_layer_is_that_of_torch(bias: bool, batch_first: bool, tmp_path: Path) -> None:
    _, file = export_orion(CASES["half"], tmp_path / "out.pth")
    layer = module_at(file).PETRAttention(16, 4, bias=bias, batch_first=batch_first)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    reference = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first)
    reference.load_state_dict(layer.attn.state_dict())
    query, key, place = torch.randn(3, 3, 16), torch.randn(3, 3, 16), torch.randn(3, 3, 16)
    wanted = query + reference(query + place, key + place, key, need_weights=False)[0]
    torch.testing.assert_close(layer(query, key, query_pos=place), wanted, atol=1e-5, rtol=1e-5)


def test_registering(tmp_path: Path) -> None:
    _, file = export_orion(CASES["half"], tmp_path / "out.pth")
    names: list[str] = []

    class Registry:
        def register_module(self) -> Any:
            return lambda cls: names.append(cls.__name__)

    module_at(file).register(Registry(), Registry())
    assert names == ["PrunedEVAViT", "PETRAttention"]
