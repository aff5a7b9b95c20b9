# SPDX-License-Identifier: Apache-2.0
"""Backbone files: ORION's container and keys, our own, and everything that can be wrong."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdfast.models import (
    EVAViT,
    checkpoint,
    eva_vit_l_orion,
    load_backbone,
    load_orion_backbone,
    save_backbone,
)
from kdfast.models.orion_keys import infer_config, orion_tables

SMALL: dict[str, Any] = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2.3,
    "window_size": 4,
    "window_block_indexes": [0, 1],
    "pretrain_img_size": 48,
}
WINDOWS = {key: SMALL[key] for key in ("img_size", "window_size", "window_block_indexes")}
KEEP = [[0, 2], [1], [0, 1, 2]]


def small(**overrides: Any) -> EVAViT:
    torch.manual_seed(3)
    return EVAViT(**{**SMALL, **overrides})


def whole_orion(model: EVAViT, prefix: str = "img_backbone.") -> dict[str, Tensor]:
    """The model's part of ORION's state dict, rotary buffers written out from the formula."""
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    for owner, side in (
        ("rope_win", 4),
        ("rope_glb", 12),
        ("blocks.0.attn.rope", 4),
        ("blocks.1.attn.rope", 4),
        ("blocks.2.attn.rope", 12),
    ):
        steps = torch.arange(side) / side * 16
        rows, cols = torch.meshgrid(steps, steps, indexing="ij")
        freqs = (10000.0 ** (-torch.arange(0, 8, 2) / 8)).repeat_interleave(2)
        angle = torch.cat((rows.reshape(-1, 1) * freqs, cols.reshape(-1, 1) * freqs), 1)
        state[f"{prefix}{owner}.freqs_cos"] = angle.cos()
        state[f"{prefix}{owner}.freqs_sin"] = angle.sin()
    return state


def same(model: EVAViT, other: EVAViT) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def arguments(model: EVAViT) -> dict[str, Any]:
    """What a checkpoint decides; the rest is up to the caller."""
    free = ("drop_path_rate", "with_cp", "frozen", "flash_attn", "mlp_ratio")
    return {key: value for key, value in model.config.items() if key not in free}


@pytest.mark.parametrize("prefix", ["img_backbone.", "module.img_backbone.", "", "module."])
@pytest.mark.parametrize("container", ["mmcv", "bare", "safetensors"])
def test_orion_checkpoint(tmp_path: Path, prefix: str, container: str) -> None:
    model = small()
    state = whole_orion(model, prefix)
    if "img_backbone" in prefix:
        lead = prefix.removesuffix("img_backbone.")
        state |= {
            f"{lead}lm_head.norm.weight": torch.ones(5),
            f"{lead}position_range": torch.ones(6),
        }
    path = tmp_path / "orion.pth"
    if container == "safetensors":
        save_file(state, path)
    else:
        meta = {"epoch": 6, "iter": 11004, "CLASSES": ("car", "van"), "config": "text"}
        whole = {"meta": meta, "state_dict": state, "optimizer": {"param_groups": [{"lr": 1e-4}]}}
        torch.save(whole if container == "mmcv" else state, path)
    loaded = load_orion_backbone(path)
    assert same(loaded, model)
    assert arguments(loaded) == arguments(model)
    assert all(p.requires_grad for p in loaded.parameters())
    path.write_bytes(b"overwritten")
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(loaded(x), model(x))


def test_real_shapes_give_orions_arguments() -> None:
    with torch.device("meta"):
        model = eva_vit_l_orion()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in orion_tables(model.config).items()}
    assert len(shapes) == 511
    assert infer_config(shapes, None) == {
        "img_size": 640,
        "patch_size": 16,
        "in_chans": 3,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "mlp_ratio": 4 * 2 / 3,
        "window_size": 16,
        "window_block_indexes": [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22],
        "pretrain_img_size": 224,
        "pretrain_use_cls_token": True,
    }


# int(44 * (60 / 44)) is 59, so the plain quotient would not do as a ratio.
@pytest.mark.parametrize("hidden", [1, 60, 117, 118, 255])
def test_hidden_width_survives_the_ratio(tmp_path: Path, hidden: int) -> None:
    shape = {"embed_dim": 44, "num_heads": 11}
    path = tmp_path / "bare.pth"
    torch.save(small(mlp_ratio=(hidden + 0.5) / 44, **shape).state_dict(), path)
    loaded = load_orion_backbone(path, num_heads=11, **WINDOWS)
    assert loaded.blocks[0].mlp.w1.out_features == hidden


def test_state_dict_without_tables_needs_the_windows(tmp_path: Path) -> None:
    model = small()
    path = tmp_path / "bare.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match="pass img_size, window_size, window_block_indexes"):
        load_orion_backbone(path, head_dim=16)
    loaded = load_orion_backbone(path, head_dim=16, drop_path_rate=0.2, **WINDOWS)
    assert same(loaded, model) and arguments(loaded) == arguments(model)
    assert loaded.config["drop_path_rate"] == 0.2
    assert load_orion_backbone(path, num_heads=3, **WINDOWS).blocks[0].attn.head_dim == 16
    assert not load_orion_backbone(path, **SMALL, frozen=True).training


def test_golden_weights_load_as_a_whole_checkpoint(shared: Path, tmp_path: Path) -> None:
    with safe_open(shared / "eva_vit_golden.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        names = [key for key in file.keys() if key.startswith("param.")]
        params = {key.removeprefix("param."): file.get_tensor(key) for key in names}
    state = params | orion_tables({**EVAViT(**config).config})
    path = tmp_path / "orion.pth"
    torch.save({"state_dict": {"img_backbone." + k: t for k, t in state.items()}}, path)
    model = load_orion_backbone(path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in params.items())
    assert (model.config["num_heads"], model.config["window_block_indexes"]) == (3, [0, 1])
    assert (model.config["img_size"], model.config["window_size"]) == (640, 16)


def test_one_error_names_everything_that_is_wrong(tmp_path: Path) -> None:
    state = whole_orion(small())
    del state["img_backbone.blocks.1.norm1.weight"]
    del state["img_backbone.patch_embed.proj.weight"]
    state["img_backbone.cls_token"] = torch.zeros(1, 1, 48)
    state["img_backbone.blocks.2.attn.proj.weight"] = torch.zeros(48, 32)
    state["img_backbone.rope_glb.freqs_sin"] = state["img_backbone.rope_glb.freqs_sin"] + 1e-3
    state["img_backbone.rope_win.freqs_cos"][0, 0] = float("nan")
    del state["img_backbone.blocks.0.attn.rope.freqs_sin"]
    path = tmp_path / "orion.pth"
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError) as caught:
        load_orion_backbone(path, patch_size=8, pretrain_img_size=48, img_size=96)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"checkpoint: {path} must fit the model, got"
    assert sorted(line.strip() for line in lines[1:]) == [
        "extra cls_token (1, 1, 48)",
        "mis-shaped blocks.2.attn.proj.weight: must be (48, 48), got (48, 32)",
        "missing blocks.0.attn.rope.freqs_sin (16, 16)",
        "missing blocks.1.norm1.weight (48,)",
        "missing patch_embed.proj.weight (48, 3, 8, 8)",
        "wrong rotary table rope_glb.freqs_sin: differs by 0.001",
        "wrong rotary table rope_win.freqs_cos: differs by nan",
    ]


def test_checkpoint_without_a_backbone(tmp_path: Path) -> None:
    path = tmp_path / "orion.pth"
    torch.save({"state_dict": {"map_head.weight": torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match="missing pos_embed") as caught:
        load_orion_backbone(path)
    assert "extra map_head.weight (2,)" in str(caught.value)
    assert str(caught.value).count("missing ") == 459


def test_half_precision_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "orion.pth"
    torch.save({k: t.half() for k, t in whole_orion(small()).items()}, path)
    loaded = load_orion_backbone(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert same(loaded, small().half().float())
    assert same(load_orion_backbone(path, dtype=torch.float16), small().half())


class Odd:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_odd_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "orion.pth", tmp_path / "executed"
    torch.save({"meta": {"cfg": Odd(trace)}, "state_dict": whole_orion(small())}, path)
    with pytest.raises(ValueError, match="mkdir.* without running code from it.*rewrite it once"):
        load_orion_backbone(path)
    assert not trace.exists()


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_orion_backbone(tmp_path / "none.pth")
    path = tmp_path / "file"
    torch.save(whole_orion(small()), path)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-1000], b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint: .*file must be"):
            load_orion_backbone(path)
    save_backbone(small(), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_backbone(path)
    for content, kind in ((torch.zeros(3), "Tensor"), ([1], "list"), ({"state_dict": 3}, "int")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"must hold a state dict, got {kind}"):
            load_orion_backbone(path)
    torch.save({"pos_embed": torch.zeros(1), "epoch": 3}, path)
    with pytest.raises(ValueError, match=r"must hold tensors, got other values for \['epoch'\]"):
        load_orion_backbone(path)
    torch.save({"pos_embed": torch.zeros(1), "module.pos_embed": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="keys must be distinct, got pos_embed and module.pos"):
        load_orion_backbone(path)


def test_old_pytorch_format(tmp_path: Path) -> None:
    path = tmp_path / "orion.pth"
    torch.save(whole_orion(small()), path, _use_new_zipfile_serialization=False)
    assert same(load_orion_backbone(path), small())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("orion_keys", [False, True])
@pytest.mark.parametrize("heads", [None, KEEP], ids=["all", "pruned"])
def test_round_trip(tmp_path: Path, heads: Any, orion_keys: bool, dtype: torch.dtype) -> None:
    model = small(heads=heads, drop_path_rate=0.1, with_cp=False).to(dtype)
    path = tmp_path / "student.safetensors"
    save_backbone(model, path, orion_keys=orion_keys)
    assert os.listdir(tmp_path) == ["student.safetensors"]
    loaded = load_backbone(path)
    assert same(loaded, model)
    assert loaded.config == model.config and loaded.heads == model.heads
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert {key[2].type for key in loaded.rope._tables} == {"cpu"}
    loaded.eval()(torch.randn(1, 3, 40, 56)).sum().backward()
    assert same(load_orion_backbone(path, dtype=dtype), model)


def test_metadata_is_readable_without_us(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_backbone(small(heads=KEEP), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(small().state_dict())
    assert json.loads(metadata["kdfast.heads"]) == KEEP
    config = json.loads(metadata["kdfast.config"])
    assert (config["depth"], config["num_heads"], config["mlp_ratio"]) == (3, 3, 2.3)


def test_orion_keys_are_those_of_orions_model(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    model = eva_vit_l_orion(embed_dim=128, num_heads=2, heads=[1])
    save_backbone(model, path, orion_keys=True)
    state = load_file(path)
    owners = ["rope_win", "rope_glb"] + [f"blocks.{i}.attn.rope" for i in range(24)]
    tables = {f"{owner}.freqs_{kind}" for owner in owners for kind in ("cos", "sin")}
    assert len(state) == 511
    assert set(state) == {"img_backbone." + name for name in tables | set(model.state_dict())}
    for i in range(24):
        for kind in ("cos", "sin"):
            table = state[f"img_backbone.blocks.{i}.attn.rope.freqs_{kind}"]
            shared = "rope_glb" if i % 3 == 2 else "rope_win"
            assert torch.equal(table, state[f"img_backbone.{shared}.freqs_{kind}"])
            assert table.shape == ((1600, 64) if i % 3 == 2 else (256, 64))
    assert state["img_backbone.blocks.0.attn.q_proj.weight"].shape == (64, 128)


def test_pruned_state_dict_needs_its_heads(tmp_path: Path) -> None:
    model = small(heads=KEEP)
    path = tmp_path / "student.pth"
    torch.save(whole_orion(model), path)
    with pytest.raises(ValueError, match="fewer heads than .*: pass heads") as caught:
        load_orion_backbone(path)
    assert "mis-shaped blocks.1.attn.q_bias: must be (48,), got (16,)" in str(caught.value)
    assert same(load_orion_backbone(path, heads=KEEP), model)


def test_rejects_foreign_files_and_models(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(dict(small().state_dict()), path)
    with pytest.raises(ValueError, match="must be a file of save_backbone.*load_orion_backbone"):
        load_backbone(path)
    with pytest.raises(TypeError, match="model must be an EVAViT, got Linear"):
        save_backbone(torch.nn.Linear(2, 2), path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give num_heads or head_dim, got both"):
        load_orion_backbone(path, num_heads=3, head_dim=16)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student.safetensors"
    save_backbone(small(), path)
    before = path.read_bytes()

    def fail(state: dict[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
        target.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_backbone(small(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["student.safetensors"]
