# SPDX-License-Identifier: Apache-2.0
"""--resume with damaged or missing files beside the checkpoints, and with other free keys."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdfast.chain import run as chain_run
from kdfast.chain.link_run import FREE as CHAIN_FREE
from kdfast.data.labelled import Classification, build_classification
from kdfast.recovery import report
from kdfast.recovery.free import FREE as RECOVERY_FREE
from kdfast.resolve.link_file import model_of, weights_of
from kdfast.train import main
from kdfast.trainer.commits import load_checkpoint, save_checkpoint
from kdfast.trainer.logs import read_rows


@pytest.fixture(scope="module")
def small() -> Classification:
    return build_classification("digits", size=16, seed=3, val_fraction=0.05, test_fraction=0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, small: Classification) -> None:
    monkeypatch.setattr(
        report, "interleave", lambda calls, **_: {name: [(1e-3, True)] for name in calls}
    )
    monkeypatch.setattr("kdfast.trainer.loop.draw_curves", lambda folder: None)
    monkeypatch.setattr(chain_run, "read_data", lambda config, seed: small)
    drawn = ("draw_curves", "draw_confusion", "draw_attention")
    for name in (*(f"summary.{n}" for n in drawn), "compare.draw_comparison"):
        monkeypatch.setattr(f"kdfast.chain.{name}", lambda *_: None)


def recovery(folder: Path, teachers: Path, *changes: str) -> list[str]:
    sets = [
        *(f"output={folder}", f"teacher.cache={teachers}", "run.device=cpu", "run.epochs=1"),
        *("data.frames=2", "data.val_frames=1", "prune.batches=1", "run.batch_size=2", *changes),
    ]
    return ["--config", "smoke", *(word for s in sets for word in ("--set", s))]


def model(dim: int) -> str:
    return f"{{img_size: 16, patch_size: 8, embed_dim: {dim}, depth: 1, num_heads: 2}}"


def chain(folder: Path, *changes: str) -> list[str]:
    sets = [
        *(f"output={folder}", "device=cpu", "twin=false", "seeds=[3]", "epochs=3", "batch=8"),
        *("data.size=16", "data.limit=24", "optim.warmup_epochs=0", "save_every=1"),
        *("chain=[vit_tiny_patch16_224]", f"model_args=[{model(8)}]", *changes),
    ]
    return ["--config", "vit_chain_digits", *(word for s in sets for word in ("--set", s))]


def test_damaged_files_beside_a_checkpoint_are_made_again(tmp_path: Path, teachers: Path) -> None:
    folder = tmp_path / "run"
    assert main(recovery(folder, teachers, "run.max_steps=2")) == 0
    whole = json.loads((folder / "baseline.json").read_text())
    forged = json.dumps({**whole, "teacher": whole["teacher"] + 0.25})
    for content in ("", '{"teacher": 0.02', "[]", '{"teacher": null}', "\x00\xff", forged):
        (folder / "baseline.json").write_text(content)
        (folder / "report.json").write_text(content)
        (folder / "steps.csv").write_bytes(content.encode() + b"\xff\x00,\n1")
        (folder / "predictions.png").write_text(content)
        (folder / "config.yaml").write_text("")
        assert main([*recovery(folder, teachers, "run.max_steps=2"), "--resume"]) == 0
        assert json.loads((folder / "baseline.json").read_text()) == whole
        assert json.loads((folder / "report.json").read_text())["models"]
    assert main([*recovery(folder, teachers), "--resume"]) == 0
    assert read_rows(folder / "steps.csv")


def test_baseline_is_of_the_images_of_today(tmp_path: Path, teachers: Path) -> None:
    """Otherwise the report would compare figures of different images."""
    folder = tmp_path / "run"
    assert main(recovery(folder, teachers, "run.eval_images=1")) == 0
    assert main([*recovery(folder, teachers, "run.eval_images=3"), "--resume"]) == 0
    assert json.loads((folder / "baseline.json").read_text())["eval_images"] == 3


def test_damaged_teacher_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teachers = tmp_path / "teachers"
    assert main(recovery(tmp_path / "run", teachers, "run.max_steps=1")) == 0
    (manifest,) = teachers.glob("*.json")
    path = manifest.with_suffix(".safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert main(recovery(tmp_path / "other", teachers, "run.max_steps=1")) == 2
    error = capsys.readouterr().err
    assert f"{path} is damaged" in error and f"delete {manifest} to train it again" in error
    manifest.unlink()
    assert main(recovery(tmp_path / "other", teachers, "run.max_steps=1")) == 0


FREE_RECOVERY = {
    "note": "another",
    "data.workers": "0",
    "data.cache": "false",
    "run.max_steps": "2",
    "run.save_every": "1",
    "run.log_every": "1",
    "run.eval_images": "2",
    "run.orion_keys": "true",
    "run.device": "auto",
}
FREE_CHAIN = {
    **{"note": "another", "save_every": "2", "log_every": "1", "eval_batch": "7"},
    **{"device": "auto", "max_steps": "5", "data.root": "null", "data.workers": "0"},
    **{"stage": "teacher", "seeds": "[3, 4]", "vary": "student", "twin": "false"},
    **{"chain": "[vit_tiny_patch16_224]", "model_args": f"[{model(8)}]", "init": "[scratch]"},
    **{"data.verify": "false", "batch": "auto", "epochs": "[3]", "vram_gib": "2.0"},
}


def test_free_keys_are_the_lists(tmp_path: Path) -> None:
    """What moves files is tried by itself: see below, and tests/test_run_folder.py.

    Shards need several processes: tests/test_sharded_runs.py.
    """
    moved = {"name", "output", "teacher.cache", "run.shard"}
    assert set(FREE_RECOVERY) | moved == set(RECOVERY_FREE)
    assert set(FREE_CHAIN) | {"name", "output", "report", "cache_dir", "shard"} == set(CHAIN_FREE)


def test_free_keys_of_a_recovery_run(tmp_path: Path, teachers: Path) -> None:
    """Every one that is listed as free to change is accepted."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    assert main(recovery(folder, teachers, "run.max_steps=1", "data.cache=true")) == 0
    folder.rename(moved)
    changes = [f"{key}={value}" for key, value in FREE_RECOVERY.items()]
    words = recovery(moved, tmp_path / "other", *changes)
    assert main([*words, "--resume"]) == 0
    assert load_checkpoint(moved / "last.pt")["step"] == 2


def test_free_keys_of_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``batch=auto`` the batch stays as it was planned, however much memory there is now."""

    def planned(run: Any, device: torch.device) -> SimpleNamespace:
        batch = 4 if run.config.vram_gib < 1 else 8
        return SimpleNamespace(batch=batch, checkpointing=False, table="")

    monkeypatch.setattr("kdfast.chain.planning.planned_batch", planned)
    folder, moved = tmp_path / "run", tmp_path / "moved"
    begin = ("max_steps=2", "batch=auto", "vram_gib=0.5")
    assert main(chain(folder, *begin)) == 0
    folder.rename(moved)
    (last,) = moved.glob("**/last.pt")
    assert load_checkpoint(last)["chain"]["batch"] == 4
    changes = [f"{key}={value}" for key, value in FREE_CHAIN.items()]
    changes += [f"report={tmp_path / 'report.json'}", f"cache_dir={tmp_path / 'cache'}"]
    assert main([*chain(moved, *changes), "--resume"]) == 0
    state = load_checkpoint(last)
    assert state["chain"]["batch"] == 4 and state["step"] == 5


def test_more_seeds_keep_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(chain(folder)) == 0
    (best,) = folder.glob("**/best.pt")
    stamp = best.stat().st_mtime_ns
    assert main([*chain(folder, "seeds=[3, 4]"), "--resume"]) == 0
    assert best.stat().st_mtime_ns == stamp
    assert len(list(folder.glob("**/best.pt"))) == 2
    assert list(folder.glob("seed4/**/best.pt")) and not list(folder.glob("seed3"))
    rows = (folder / "comparison.csv").read_text().splitlines()
    assert len(rows) == 3
    assert main([*chain(folder, "seeds=[4]"), "--resume"]) == 0
    assert len(list(folder.glob("**/best.pt"))) == 2


def test_best_is_that_of_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed between the commit and its names, the run must not go on with the older best."""
    original, count = os.replace, [0]

    def dies(source: Any, target: Any) -> None:
        count[0] += Path(target).name == "best.pt"
        if count[0] == 2:
            raise SystemExit
        original(source, target)

    # The second epoch, which ends at step 6, is better than the first and the third.
    score = "kdfast.chain.watch.LinkWatch._score"
    monkeypatch.setattr(score, lambda _, row: (row["step"] % 9, 0.0))
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(SystemExit):
            main(chain(folder))
    (path,) = folder.glob("**/best.pt")
    assert load_step(path) == 3 and (path.parent / "next.pt").exists()
    assert main([*chain(folder), "--resume"]) == 0
    state = load_checkpoint(path.with_name("last.pt"))
    assert load_checkpoint(path)["step"] == state["chain"]["best"]["step"] == 6
    assert not (path.parent / "next.pt").exists()
    # Damage of the best weights is seen wherever they are used.
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="best.pt is damaged"):
        model_of(path)
    (summary,) = folder.glob("**/summary.json")
    summary.write_text('{"role": "tea')
    capsys.readouterr()
    assert main([*chain(folder), "--resume"]) == 2
    assert "best.pt is damaged" in capsys.readouterr().err
    path.unlink()
    assert main([*chain(folder), "--resume"]) == 2
    assert "best.pt is gone, and no epoch is left" in capsys.readouterr().err


def load_step(path: Path) -> int:
    step: int = torch.load(path, weights_only=True)["step"]
    return step


def test_best_that_is_gone_is_chosen_anew(tmp_path: Path) -> None:
    """After best.pt was deleted, as the message advises: never a record without its weights."""
    folder = tmp_path / "run"
    assert main(chain(folder, "max_steps=7")) == 0
    (path,) = folder.glob("**/best.pt")
    path.unlink()
    assert main([*chain(folder), "--resume"]) == 0
    state = load_checkpoint(path.with_name("last.pt"))
    assert load_checkpoint(path)["step"] == state["chain"]["best"]["step"] == 9
    assert weights_of(load_checkpoint(path))


def test_unfinished_summaries_do_not_block(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(chain(folder)) == 0
    (summary,) = folder.glob("**/summary.json")
    before = json.loads(summary.read_text())
    for content in ("", '{"role": "teacher"', "{}", "[]"):
        summary.write_text(content)
        assert main([*chain(folder), "--resume"]) == 0
        after = json.loads(summary.read_text())
        assert after["test_accuracy"] == before["test_accuracy"]


def test_left_over_files_are_removed(tmp_path: Path, teachers: Path) -> None:
    from kdfast.machine import files

    folder = tmp_path / "run"
    assert main(recovery(folder, teachers, "run.max_steps=1")) == 0
    mine = folder / f".steps.{files._NODE}-{os.getpid()}.kdfast.csv"
    other = folder / ".notes.tmp"
    for path in (mine, other, folder / "next.pt"):
        path.write_text("half")
    assert main([*recovery(folder, teachers, "run.max_steps=1"), "--resume"]) == 0
    assert other.exists() and not mine.exists() and not (folder / "next.pt").exists()


@pytest.mark.slow
def test_torchrun_without_a_gpu_joins(tmp_path: Path) -> None:
    """With device ``auto``: one run of two processes, not two runs."""
    words = recovery(tmp_path / "run", tmp_path / "teachers", "run.device=auto", "run.max_steps=2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "kdfast.train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x cpu" in done.stdout and not (tmp_path / "run-2").exists()
    assert load_checkpoint(tmp_path / "run/last.pt")["world"] == 2


def test_processes_that_do_not_find_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Alone:
        num_processes, device = 1, torch.device("cpu")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("kdfast.trainer.processes.Accelerator", lambda **_: Alone())
    assert main(recovery(tmp_path / "run", tmp_path)) == 2
    error = capsys.readouterr().err
    assert "2 processes were started together (WORLD_SIZE), but 1 found each other" in error


def test_manifest_that_is_damaged_names_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], teachers: Path
) -> None:
    folder = tmp_path / "run"
    assert main(recovery(folder, teachers, "run.max_steps=1")) == 0
    (folder / "manifest.json").write_text("{")
    capsys.readouterr()
    words = [*recovery(folder, teachers, "run.max_steps=1"), "--resume"]
    assert main(words) == 2
    assert "manifest.json is damaged" in capsys.readouterr().err
    (folder / "manifest.json").unlink()
    assert main(words) == 0
    save_checkpoint(tmp_path, {"step": 1})
