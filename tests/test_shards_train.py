# SPDX-License-Identifier: Apache-2.0
"""Commands on tar shards give what they give on the folder that was packed, bit for bit."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kdfast
from kdfast import prune
from kdfast.data.__main__ import main as data_main
from kdfast.data.views.bench2drive import CAMERAS
from kdfast.models import save_backbone
from kdfast.models.eva import EVAViT
from kdfast.pruning.saving import save_pretrained
from kdfast.resolve.error import SourceError
from kdfast.resolve.link_file import weights_of
from kdfast.sources import image_batches, judged_pictures
from kdfast.train import main
from kdfast.trainer.commits import load_checkpoint

pytestmark = pytest.mark.usefixtures("quick", "plain")
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No pictures of results, and indexes of shards in a folder of the test."""
    monkeypatch.setenv("KDFAST_CACHE", str(tmp_path / "cache"))
    for name in ("draw_curves", "draw_confusion", "draw_attention"):
        monkeypatch.setattr(f"kdfast.chain.summary.{name}", lambda *_: None)
    monkeypatch.setattr("kdfast.chain.compare.draw_comparison", lambda *_: None)


def write(path: Path, seed: int, side: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    image = cv2.resize(small, (side + 8, side), interpolation=cv2.INTER_CUBIC)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    root = tmp_path / "classes"
    for n in range(60):
        split = "val" if n % 10 == 0 else "test" if n % 10 == 5 else "train"
        write(root / split / "abc"[n % 3] / f"{n:03d}.png", n)
    return root


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    root = tmp_path / "b2d"
    for n in range(4):
        for frame in range(3):
            for m, camera in enumerate(CAMERAS):
                place = root / "v1" / f"clip{n}" / "camera" / camera / f"{frame:05d}.jpg"
                write(place, 100 * n + 10 * frame + m, 64)
    (root / "split.json").write_text(json.dumps({"val": ["v1/clip3"]}))
    return root


def packed(source: Path, count: int = 7) -> Path:
    out = source.parent / "shards"
    words = ["shard", str(source), "--out", str(out), "--samples-per-shard", str(count)]
    assert data_main(words) == 0
    return out


@pytest.fixture
def memory() -> Iterator[Any]:
    """A filesystem that is reached by URL only."""
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/set"):
        files.rm("/set", recursive=True)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def sets(changes: dict[str, Any]) -> list[str]:
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


def chain(folder: Path, root: object, *more: str, **changes: Any) -> list[str]:
    sizes = "{img_size: 16, patch_size: 8, embed_dim: %d, depth: 1, num_heads: 2}"
    words = {
        "device": "cpu", "twin": "false", "seeds": "[3]", "epochs": 2, "batch": 8,
        "data.size": 16, "optim.warmup_epochs": 1, "data.variants": 2, "cache": "false",
        "chain": "[vit_small_patch16_224, vit_tiny_patch16_224]",
        "model_args": f"[{sizes % 16}, {sizes % 8}]",
        "output": folder, **{f"data.{k}": v for k, v in changes.items()},
    }  # fmt: skip
    return ["--config", "vit_chain", "--data", str(root), *sets(words), *more]


def chained(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of the student and what was measured of all links."""
    (path,) = folder.glob("**/student/checkpoints/best.pt")
    logs = [row for path in sorted(folder.glob("**/logs/*_log.csv")) for row in rows(path)]
    assert len(logs) == 4
    losses = [row[name] for row in logs for name in ("train_loss", "val_loss")]
    return weights_of(load_checkpoint(path)), losses


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_chain(tmp_path: Path, classes: Path, memory: Any) -> None:
    out = packed(classes)
    assert main(chain(tmp_path / "folder", classes)) == 0
    weights, losses = chained(tmp_path / "folder")
    memory.put(str(out), "/set", recursive=True)
    places: dict[str, tuple[object, int]] = {"one": (out, 1), "two": ("memory://set", 2)}
    for name, (root, workers) in places.items():
        assert main(chain(tmp_path / name, root, workers=workers)) == 0
        found = chained(tmp_path / name)
        assert_same(found[0], weights)
        assert found[1] == losses


@pytest.mark.slow
def test_a_chain_goes_on_in_mid_epoch(tmp_path: Path, classes: Path) -> None:
    out = packed(classes)
    assert main(chain(tmp_path / "whole", out)) == 0
    words = chain(tmp_path / "parts", out, workers=1)
    assert main([*words, "--set", "max_steps=4"]) == 0
    assert main([*chain(tmp_path / "parts", out, workers=2), "--resume"]) == 0
    one, other = chained(tmp_path / "whole"), chained(tmp_path / "parts")
    assert_same(one[0], other[0])


@pytest.mark.slow
def test_orion_on_shards_of_bench2drive(tmp_path: Path, drive: Path) -> None:
    out = packed(drive, 2)
    torch.manual_seed(0)
    model = EVAViT(
        img_size=64, patch_size=16, embed_dim=128, depth=4, num_heads=2, window_size=3,
        window_block_indexes=[0, 2], pretrain_img_size=64,
    )  # fmt: skip
    save_backbone(model, tmp_path / "eva.safetensors")
    common = {
        "teacher.checkpoint": tmp_path / "eva.safetensors", "data.split_file": drive / "split.json",
        "data.size": "[64, 64]", "run.device": "cpu", "run.batch_size": 2, "run.log_every": 1,
        "run.max_steps": 3, "prune.batches": 2, "teacher.cache": tmp_path,
    }  # fmt: skip
    found = []
    for root, workers in ((drive, 0), (out, 2)):
        folder = tmp_path / f"run{len(found)}"
        words = sets({"output": folder, "data.workers": workers, **common})
        assert main(["--config", "orion50", "--data", str(root), *words]) == 0
        steps = rows(folder / "steps.csv")
        losses = [{k: v for k, v in row.items() if k in ("step", "total", "kd")} for row in steps]
        found.append((load_file(folder / "student.safetensors"), losses))
    for weights, losses in found[1:]:
        assert_same(weights, found[0][0])
        assert losses == found[0][1] and len(losses) == 3


def vit(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=classes).eval()
    return model


@pytest.mark.parametrize("labels", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_distillation(tmp_path: Path, classes: Path, labels: bool) -> None:
    out, found = packed(classes), []
    for root in (classes, str(out) if labels else f"file://{out}"):
        teacher = vit()
        student = kdfast.prune_heads(teacher, [[0, 2], [1]])
        kdfast.distil(
            student, teacher, root, output=str(tmp_path / f"run{len(found)}"), labels=labels,
            epochs=1, batch_size=4,
        )  # fmt: skip
        found.append(student.state_dict())
    assert_same(found[0], found[1])


def test_pictures_of_commands(tmp_path: Path, classes: Path, drive: Path) -> None:
    """The same pictures, the held-out ones first, and their classes."""
    out, model = packed(classes), vit()
    options: dict[str, Any] = {"count": 10, "batch_size": 4}
    one, other = (list(image_batches(model, (32, 32), x, **options)) for x in (classes, out))
    assert sum(map(len, one)) >= 10 and all(map(torch.equal, one, other))
    options |= {"classes": 3, "used": []}
    judged = [judged_pictures(model, (32, 32), x, **options) for x in (classes, str(out))]
    assert all(map(torch.equal, judged[0].batches, judged[1].batches))
    assert judged[0].labels is not None and judged[1].labels is not None
    assert torch.equal(judged[0].labels, judged[1].labels)
    assert judged[1].origin.startswith(f"6 pictures of val of {out}, none of which")
    out.rename(tmp_path / "away")
    views = packed(drive)
    assert sum(map(len, image_batches(model, (32, 32), views, count=72, batch_size=8))) == 72
    first = sorted(views.glob("*.tar"))[0]
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(SourceError, match="--data: .*all-000000.tar: v1/clip0/.* cannot be read"):
        list(image_batches(model, (32, 32), views, count=72, batch_size=8))
    with pytest.raises(SourceError, match=r"--data: must hold \*.tar shards"):
        list(image_batches(model, (32, 32), "memory://gone", count=1, batch_size=1))


def test_the_prune_command(tmp_path: Path, classes: Path, capsys: Any) -> None:
    out = packed(classes)
    save_pretrained(vit(), tmp_path / "model")
    texts = []
    for n, root in enumerate((classes, out)):
        words = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / f"half{n}")]
        words += ["--keep", "2", "--method", "taylor", "--rounds", "2", "--calibrate", "8"]
        assert prune.main([*words, "--data", str(root)]) == 0
        texts.append(capsys.readouterr().out)
    assert_same(*(load_file(next((tmp_path / f"half{n}").glob("*.safetensors"))) for n in (0, 1)))
    assert f"--data {out} --labels" in texts[1]
