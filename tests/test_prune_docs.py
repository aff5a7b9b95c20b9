# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/use/add_a_family.md and docs/use/pruning.md, as a reader would run them."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import kdfast.pruning.families
from kdfast.pruning.latency_file import Setting, write_table
from tests.test_prune_families import hugging_face, silenced

DOCS = Path(__file__).resolve().parents[1] / "docs" / "use"


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


def test_add_a_family(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdfast.pruning.families, "_registered", [])
    names: dict[str, Any] = {"__name__": "docs"}
    for code in blocks("add_a_family.md"):
        exec(code, names)
    out = capsys.readouterr().out
    assert "MyViT, 3 blocks, one 32 x 32 image" in out
    block = names["small"].blocks[0].attn
    assert block.heads == 2 and block.kept_heads == names["kept"][0]
    # Steps compose, and hidden units are cut as the page says.
    again = kdfast.prune_heads(names["small"], [[1], [], [0]])
    assert again.blocks[0].attn.kept_heads == [names["kept"][0][1]]
    model, units = names["model"], names["units"]
    small = kdfast.prune_heads(model, None, mlp=units)
    assert torch.equal(small.blocks[2].up.weight, model.blocks[2].up.weight[units[2]])
    assert len(units[2]) == 64


def planted_table(model: torch.nn.Module) -> None:
    """Times of the model's two blocks, 4.5 ms each and 1 ms for the rest, where they are sought."""
    ms = [[4.5 / 2 * (h / 4 + u / 192) for u in (0, 192)] for h in (0, 4)]
    kind = {"blocks": [0, 1], "heads": [0, 4], "units": [0, 192], "ms": ms}
    numbers = {"dense_ms": 10.0, "fixed_ms": 1.0, "spread": 0.01}
    setting = Setting.of(model, 1, torch.float32, (32, 32))
    write_table(setting, {**numbers, "kinds": [kind]}, True)


@pytest.mark.filterwarnings("ignore:calibrate. .* tokens")
def test_pruning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    build = timm.create_model

    def small(name: str, pretrained: bool, **given: Any) -> torch.nn.Module:
        sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 32, "num_classes": 5}
        return build(name, **{**sizes, **given})

    monkeypatch.setattr(timm, "create_model", small)
    labels = torch.tensor([1, 2])
    names: dict[str, Any] = {
        "loader": [(torch.randn(2, 3, 32, 32), labels)],
        "images": torch.randn(2, 3, 32, 32),
        "labels": labels,
        "criterion": torch.nn.functional.cross_entropy,
    }
    monkeypatch.setenv("KDFAST_CACHE", str(tmp_path))
    first, gates, rating, fast = blocks("pruning.md")
    exec(first, names)
    exec(gates, names)
    names["kept_by_taylor"] = names["kept"]
    names["kept_by_entropy"] = kdfast.select_heads(names["gates"].scores(), 2)
    exec(rating, names)
    monkeypatch.setattr(timm, "create_model", build)
    again = kdfast.load_pretrained("vit_base_half")
    with torch.no_grad():
        torch.testing.assert_close(again(names["images"]), names["small"](names["images"]))
    planted_table(names["model"])
    exec(fast, names)
    assert names["found"].predicted_ms <= 10 / 1.5


@pytest.mark.filterwarnings("ignore:calibrate. .* tokens")
def test_compensation(monkeypatch: pytest.MonkeyPatch) -> None:
    build = timm.create_model

    def small(name: str, pretrained: bool) -> torch.nn.Module:
        return build(name, depth=2, embed_dim=48, num_heads=4, img_size=32, num_classes=5)

    monkeypatch.setattr(timm, "create_model", small)
    names: dict[str, Any] = {"loader": [torch.randn(2, 3, 32, 32)] * 3}
    (code,) = blocks("compensation.md")
    exec(code, names)
    small_cost, cost = (kdfast.pruning_report(names[x]).full for x in ("small", "model"))
    assert small_cost.flops - small_cost.embed <= 0.5 * (cost.flops - cost.embed)
    x = names["loader"][0]
    with torch.no_grad():
        cut = kdfast.prune_heads(names["model"], names["kept"], mlp=names["mlp"])
        want = names["model"](x)
        for name in ("small", "better"):
            assert (names[name](x) - want).norm() < (cut(x) - want).norm()


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DeiTModel", "Dinov2Model", "CLIPVisionModel"]
)
def test_from_prune_heads(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = hugging_face(name)
    names: dict[str, Any] = {
        "model": model,
        "loader": [x],
        "criterion": lambda output: output[0].square().mean(),
        "metric": lambda output, batch: -output[0].square().mean(),
    }
    first, rest = blocks("from_prune_heads.md")
    exec(first, names)
    assert names["kept"] == [[0, 2], [1, 2, 3]]
    with torch.no_grad():
        want = silenced(model, names["kept"], None)(x)[0]
        torch.testing.assert_close(names["small"](x)[0], want, rtol=1e-4, atol=1e-5)
    exec(rest, names)
    assert eval(capsys.readouterr().out) == names["kept"]
    with torch.no_grad():
        out = names["again"](x)[0]
        assert torch.equal(out, names["small"](x)[0])
    assert names["value"] == pytest.approx(-out.square().mean().item(), rel=1e-4)
