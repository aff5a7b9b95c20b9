# SPDX-License-Identifier: Apache-2.0
"""ORION's own size: EVA-ViT-L at 640 x 640 from a checkpoint file, on a CPU, within 20 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data.orion.prepare import new_sample
from kdfast.data.orion.sample import SPLIT_FILE, SampleOptions
from kdfast.models import eva_vit_l_orion, load_backbone
from kdfast.models.orion import OrionHeads
from kdfast.trainer.commits import load_checkpoint
from kdfast.trainer.logs import read_rows

# Prints the peak resident memory in KiB of the process that ran the training.
WORKER = """
import resource, sys
from kdfast.train import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.slow
def test_three_steps_and_resume(tmp_path: Path) -> None:
    torch.save({"meta": {}, "state_dict": orion_state()}, tmp_path / "orion.pth")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0)
    for i in range(20):
        small = noise.integers(0, 256, (9, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((800, 450)).save(pictures / f"{i:02d}.jpg")
    changes = {
        "output": tmp_path / "run",
        "teacher.checkpoint": tmp_path / "orion.pth",
        "data.kind": "images",
        "data.root": pictures,
        "data.workers": 0,
        "prune.batches": 1,
        "prune.calibration_views": 2,
        "run.batch_size": 1,
        "run.device": "cpu",
        "run.eval_images": 1,
        "run.log_every": 1,
    }
    words = ["--config", "orion50"]
    words += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    out = run([*words, "--set", "run.max_steps=3"])
    assert int(out.rsplit("peak ", 1)[1]) < 20 * 2**20
    folder = tmp_path / "run"
    assert load_checkpoint(folder / "last.pt")["step"] == 3
    run([*words, "--set", "run.max_steps=4", "--resume"])
    steps = read_rows(folder / "steps.csv")
    assert [row["step"] for row in steps] == ["1", "2", "3", "4"]
    assert all(np.isfinite(float(row["total"])) for row in steps)
    teacher, pruned, compensated, distilled = json.loads((folder / "report.json").read_text())[
        "models"
    ]
    assert pruned["quality"] < compensated["quality"]
    assert teacher["params"] == 303_388_608 and distilled["params"] == 253_032_384
    assert (teacher["gmac"], pruned["gmac"]) == pytest.approx((537.178, 430.240), rel=1e-5)
    student = load_backbone(folder / "student.safetensors")
    assert [len(kept) for kept in student.heads] == [8] * 24


@pytest.mark.slow
def test_a_step_through_the_heads(tmp_path: Path) -> None:
    heads = OrionHeads().state_dict()
    torch.save({"meta": {}, "state_dict": {**orion_state(), **heads}}, tmp_path / "orion.pth")
    root = tmp_path / "b2d"
    new_sample(root, SampleOptions(clips=3, val_clips=1, frames=2, size=(450, 800)))
    changes = {
        "output": tmp_path / "run",
        "teacher.checkpoint": tmp_path / "orion.pth",
        "data.root": root,
        "data.split_file": root / "splits" / SPLIT_FILE,
        "data.workers": 0,
        "prune.method": "magnitude",
        "prune.compensate": False,
        "run.batch_size": 1,
        "run.device": "cpu",
        "run.eval_images": 6,
        "run.log_every": 1,
        "run.max_steps": 1,
    }
    words = ["--config", "orion50"]
    words += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    out = run(words)
    assert int(out.rsplit("peak ", 1)[1]) < 20 * 2**20
    (step,) = read_rows(tmp_path / "run" / "steps.csv")
    assert float(step["detection"]) > 0 and float(step["map"]) > 0
    assert np.isfinite(float(step["total"]))
    frames = json.loads((tmp_path / "run" / "frames.json").read_text())
    assert frames["frames"] == 1 and len(frames["models"]["distilled"]["blocks"]) == 24


def orion_state() -> dict[str, torch.Tensor]:
    """State dict under ORION's names, as in its checkpoints."""
    model = eva_vit_l_orion()
    state = {f"img_backbone.{name}": value for name, value in model.state_dict().items()}
    for key, (rows, blocks) in {
        "rope_win": (256, [i for i in range(24) if i % 3 != 2]),
        "rope_glb": (1600, range(2, 24, 3)),
    }.items():
        side = int(rows**0.5)
        rope = model.rope((side, side), model.patch_embed.proj.weight)
        for name, table in (("freqs_cos", rope.cos), ("freqs_sin", rope.sin)):
            state[f"img_backbone.{key}.{name}"] = table
            for i in blocks:
                state[f"img_backbone.blocks.{i}.attn.rope.{name}"] = table
    return state


def run(words: list[str]) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", WORKER, *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
