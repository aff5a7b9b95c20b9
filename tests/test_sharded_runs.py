# SPDX-License-Identifier: Apache-2.0
"""Commands with sharded models on several processes, against those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import kdfast

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(folder: Path, command: str, processes: int, *words: str) -> str:
    """What a command says that several processes run together."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launch, "-m", f"kdfast.{command}", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "Warning" not in done.stderr
    return done.stdout + done.stderr


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Raises AssertionError where weights differ by more than the order of sums explains."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-3, atol=2e-5, msg=name)


def test_recovery_with_two_and_three_processes_and_one_between(tmp_path: Path) -> None:
    def train(folder: str, processes: int, *words: str, resume: bool = False) -> str:
        sets = [f"output={tmp_path / folder}", "run.device=cpu", "run.checkpointing=true", *words]
        flags = [word for one in sets for word in ("--set", one)]
        flags += ["--resume"] if resume else []
        return run(tmp_path, "train", processes, "--config", "smoke", *flags)

    train("one", 1, "run.batch_size=8")
    said = train("parts", 2, "run.shard=fsdp", "run.max_steps=4")
    assert "student.safetensors" in said
    train("parts", 1, "run.max_steps=8", resume=True)
    assert "distil 12/12" in train("parts", 3, "run.shard=fsdp", resume=True)
    same(*(load_file(tmp_path / name / "student.safetensors") for name in ("parts", "one")))


def test_chain(tmp_path: Path) -> None:
    sizes = ((24, 2), (16, 1), (8, 1))
    shapes = [f"embed_dim: {dim}, depth: {depth}, num_heads: 2" for dim, depth in sizes]
    models = ", ".join(f"{{img_size: 16, patch_size: 8, {shape}}}" for shape in shapes)
    common = ["device=cpu", "twin=false", "seeds=[3]", "epochs=2", "data.size=16", "data.limit=48"]
    common += ["optim.warmup_epochs=1", f"model_args=[{models}]", "distill.feature=1"]

    def train(folder: str, processes: int, *words: str, resume: bool = False) -> None:
        sets = [f"output={tmp_path / folder}", *common, *words]
        flags = [word for one in sets for word in ("--set", one)]
        flags += ["--resume"] if resume else []
        run(tmp_path, "train", processes, "--config", "vit_chain_digits", *flags)

    def last(folder: str, role: str) -> dict[str, Tensor]:
        place = tmp_path / folder / "from_scratch" / "digits" / role / "checkpoints" / "last.pt"
        held: dict[str, Tensor] = torch.load(place, weights_only=True)["module"]
        return held

    train("one", 1, "batch=16")
    train("two", 2, "batch=8", "max_steps=4")
    train("two", 2, "batch=8", "shard=fsdp", resume=True)
    for role in ("teacher", "assistant", "student"):
        same(last("two", role), last("one", role))
    assert (tmp_path / "two" / "comparison.csv").is_file()


def test_distill(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(12):
        Image.effect_noise((40, 40), 10.0 * number).convert("RGB").save(pictures / f"{number}.png")
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=4, **options)
    teacher = kdfast.prune_heads(teacher, [[0, 1, 2]] * 2)
    kdfast.save_pretrained(teacher, tmp_path / "teacher")
    kdfast.save_pretrained(kdfast.prune_heads(teacher, [[0, 1], [2]]), tmp_path / "half")
    words = ["--teacher", "teacher", "--student", "half", "--data", "pictures", "--device", "cpu"]
    words += ["--epochs", "2", "--no-augment"]
    run(tmp_path, "distill", 1, *words, "--batch-size", "4", "--out", "one")
    run(tmp_path, "distill", 2, *words, "--batch-size", "2", "--out", "two", "--shard", "fsdp")
    got, want = (kdfast.load_pretrained(tmp_path / name / "student") for name in ("two", "one"))
    same(got.state_dict(), want.state_dict())
    assert not torch.equal(got.head.weight, teacher.head.weight)
