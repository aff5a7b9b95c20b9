# SPDX-License-Identifier: Apache-2.0
"""Whole runs by two gloo processes: what they choose and measure is what one process does."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from kdfast import evaluate
from kdfast.data.orion.prepare import new_sample
from kdfast.data.orion.sample import SampleOptions
from kdfast.testing.ranks import in_ranks
from kdfast.train import main

pytestmark = pytest.mark.usefixtures("quick")


def together(world, command):
    """Run a command in several processes; all have to end with status 0."""

    def work(rank):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        names = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "29500"
        assert command() == 0

    assert in_ranks(world, work, seconds=300) == [""] * world


def words(config, folder, *changes):
    sets = [f"output={folder}", *changes]
    return ["--config", config, *(word for one in sets for word in ("--set", one))]


def read(path: Path):
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["taylor", "reconstruction"])
def test_a_recovery_starts_alike(tmp_path, teachers, method):
    changes = [
        *(f"teacher.cache={teachers}", "run.device=cpu", "run.epochs=1", "run.max_steps=1"),
        *("data.frames=3", "data.val_frames=1", "prune.batches=3", "prune.batch_size=2"),
        *("run.batch_size=2", f"prune.method={method}", "prune.calibration_views=9"),
    ]
    assert main(words("smoke", tmp_path / "one", *changes)) == 0
    together(2, lambda: main(words("smoke", tmp_path / "two", *changes)))
    one, two = (
        {name: read(tmp_path / run / name) for name in ("baseline.json", "head_scores.json")}
        for run in ("one", "two")
    )
    scores = [one["head_scores.json"], two["head_scores.json"]]
    if method == "taylor":
        assert scores[0] == scores[1] and scores[0]["metadata"]["batches"] == 3
    else:
        for a, b in zip(*(torch.tensor(found["scores"]) for found in scores), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
    for name in ("teacher", "pruned"):
        assert one["baseline.json"][name] == two["baseline.json"][name]
    compensated = one["baseline.json"]["compensated"]
    assert two["baseline.json"]["compensated"] == pytest.approx(compensated, rel=1e-3)
    assert (tmp_path / "two/report.html").is_file() and not (tmp_path / "two-2").exists()


@pytest.mark.slow
def test_frames_are_evaluated_alike(tmp_path, teachers, capfd):
    root = tmp_path / "data"
    new_sample(root, SampleOptions(clips=5, val_clips=3, frames=3, size=(96, 160)))
    changes = [
        *(f"data.root={root}", f"teacher.cache={teachers}", "data.size=[64, 64]"),
        f"data.split_file={root}/splits/bench2drive_base_train_val_split.json",
        *("data.sequence=3", "run.batch_size=1", "run.device=cpu", "run.max_steps=1"),
        *("prune.batches=2", "prune.calibration_views=12", "teacher.fit.epochs=1"),
        "teacher.fit.model={img_size: 64, embed_dim: 32, depth: 3, num_heads: 4, window_size: 4}",
        "teacher.fit.model.window_block_indexes=[0]",
        "teacher.fit.heads={dim: 16, layers: 1, ffn: 16, queries: 6, lanes: 4, dn_groups: 1}",
    ]
    assert main(words("orion50_mini", tmp_path / "one", *changes)) == 0
    together(2, lambda: main(words("orion50_mini", tmp_path / "two", *changes)))
    kept = [read(tmp_path / run / "frames.json") for run in ("one", "two")]
    for name in ("teacher", "pruned"):
        assert repr(kept[0]["models"][name]) == repr(kept[1]["models"][name])
    assert kept[0]["frames"] == kept[1]["frames"] == 9

    def command(out):
        own = tmp_path / "one"
        given = ["--config", str(own / "config.yaml"), "--out", str(tmp_path / out)]
        return evaluate.main([*given, "--checkpoint", str(own / "student.safetensors")])

    capfd.readouterr()
    assert command("alone") == 0
    said = capfd.readouterr().out.replace("alone", "shared")
    together(2, lambda: command("shared"))
    assert capfd.readouterr().out == said
    assert repr(read(tmp_path / "alone/frames.json")) == repr(read(tmp_path / "shared/frames.json"))


@pytest.mark.slow
def test_a_chain_goes_through(tmp_path):
    model = "{img_size: 16, patch_size: 8, embed_dim: 8, depth: 1, num_heads: 2}"
    changes = [
        *("device=cpu", "twin=false", "seeds=[3]", "epochs=1", "batch=8", "eval_batch=40"),
        *("data.size=16", "data.limit=24", "optim.warmup_epochs=0"),
        *("chain=[vit_tiny_patch16_224]", f"model_args=[{model}]"),
    ]
    together(2, lambda: main(words("vit_chain_digits", tmp_path / "two", *changes)))
    assert list((tmp_path / "two").rglob("summary.json"))
