# SPDX-License-Identifier: Apache-2.0
"""The command ``kdfast distill``: its options and configs, the models it takes, its errors."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kdfast
from kdfast.commandline.distill import parser
from kdfast.configs.distil import DistilConfig
from kdfast.distill import main
from kdfast.nn.attention import FusedAttention
from kdfast.prune import main as prune
from tests.test_distillation_run import noise_pictures, pair

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return noise_pictures(tmp_path / "pictures", 30)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """--teacher and --student of saved models."""
    student, teacher = pair()
    found = []
    for flag, model in (("--teacher", teacher), ("--student", student)):
        path = tmp_path / flag.strip("-")
        kdfast.save_pretrained(model, path)
        found += [flag, str(path)]
    return found


def test_command_line(
    tmp_path: Path, pictures: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    call = [*folders, "--data", str(pictures), "--out", str(out), "--epochs", "1"]
    call += ["--batch-size", "4", "--lr", "1e-3", "--attention", "0.3", "--labels"]
    assert main([*call, "--max-steps", "2"]) == 0
    assert "; --resume goes on" in capsys.readouterr().out and not (out / "student").exists()
    assert main([*call, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "attention, weight 0.3" in shown and str(out / "student") in shown
    held = [len(reader.heads) for reader in kdfast.load_pretrained(out / "student").modules()
            if isinstance(reader, FusedAttention)]  # fmt: skip
    assert held == [2, 1]
    # With other options it is refused, and the run's own config has all of them.
    assert main([*call, "--lr", "2e-3", "--resume"]) == 2
    own = ["--config", str(out / "config.yaml"), "--resume"]
    assert capsys.readouterr().err.rstrip().endswith(" ".join(own))
    assert main(own) == 0
    assert str(out / "student") in capsys.readouterr().out
    # The student is a model for every command, this one too.
    more = ["--teacher", folders[1], "--student", str(out / "student"), "--data", str(pictures)]
    assert main([*more, "--out", str(tmp_path / "two"), "--epochs", "1", "--batch-size", "4"]) == 0


ERRORS = [
    (["--lr", "0"], "error: --lr: must be above 0, got 0.0"),
    (["--val-fraction", "0.9"], "error: --val-fraction: must be at most 0.5, got 0.9"),
    (["--embedding", "1"], "error: --embedding: cannot be formed: both models return logits"),
    (["--teacher", "vit_tony"], "error: --teacher: timm has no model 'vit_tony'"),
    (["--student", "nowhere/x"], "error: --student: "),
    (
        ["--student", "test_vit", "--student-checkpoint", "README.md"],
        "error: --student-checkpoint: ",
    ),
    (["--teacher-checkpoint", "none.pt"], "error: --teacher-checkpoint: there is no file none.pt"),
    (["--data", "none"], "error: --data: there is no folder or .tar none"),
    (["--resume"], "error: --resume: there is no run in"),
]


@pytest.mark.parametrize(("flags", "message"), ERRORS)
def test_errors_of_the_command_line(
    flags: list[str],
    message: str,
    tmp_path: Path,
    pictures: Path,
    folders: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert main([*folders, "--data", str(pictures), "--out", str(out), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not out.exists()


def test_a_config_without_resume_begins_anew(
    tmp_path: Path, pictures: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    call = [*folders, "--data", str(pictures), "--out", str(out), "--no-augment", "--labels"]
    assert main([*call, "--batch-size", "4", "--max-steps", "1"]) == 0
    config = ["--config", str(out / "config.yaml")]
    assert main([*config, "--max-steps", "2", "--lr", "1e-3"]) == 0
    again = yaml.safe_load((tmp_path / "run-2" / "config.yaml").read_text())
    assert (again["lr"], again["labels"], again["augment"]) == (1e-3, True, False)
    assert (again["student"], again["data"]) == (folders[3], str(pictures))
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "error: --config: no such file" in capsys.readouterr().err
    other = tmp_path / "other.yaml"
    other.write_text("name: smoke\n")
    assert main(["--config", str(other)]) == 2
    assert "is that of another run; try kdfast train --config" in capsys.readouterr().err


def test_a_student_by_name_gets_the_teachers_classes(
    tmp_path: Path, pictures: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call = [*folders[:2], "--student", "test_vit", "--data", str(pictures), "--epochs", "1"]
    assert main([*call, "--batch-size", "4", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "note: the student has random weights" in shown
    assert "starts anew, with the teacher's 3 classes" in shown
    assert "the student was not cut from the teacher: " in shown


def test_random_weights_are_those_that_were_pruned(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = ["--model", "test_vit", "--out", str(tmp_path / "half"), "--seed", "3", "--keep", "1.0"]
    less = ["--method", "magnitude", "--rounds", "2", "--pictures", "0", "--no-compensate"]
    assert prune([*half, *less, "--data", str(pictures)]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["kdfast", "distill"] and "--seed 3" in " ".join(command)
    call = [*command[2:], "--out", str(tmp_path / "run"), "--batch-size", "4"]
    assert main([*call, "--max-steps", "1"]) == 0
    assert "student before training: cosine 1.0000" in capsys.readouterr().out
    assert main([*call, "--max-steps", "2", "--resume"]) == 0


def test_the_command_line_names_every_option_and_needs_no_torch() -> None:
    known = {action.dest for action in parser()._actions}
    renamed = {"output": "out", "augment": "no_augment", "accelerate": "no_accelerate"}
    for name in DistilConfig.__dataclass_fields__:
        assert renamed.get(name, name) in known
    code = (
        "import sys, kdfast.distill, kdfast.commandline.distill as d; d.parser().format_help();"
        "assert not {'timm', 'accelerate', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
