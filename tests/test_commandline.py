# SPDX-License-Identifier: Apache-2.0
"""The command ``kdfast``: help without torch, and answers to words that it does not know."""

import argparse
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kdfast import __version__, commandline
from kdfast.__main__ import COMMANDS, main
from kdfast.commandline import attention, compare, data, prune
from kdfast.commandline.parser import size_of
from kdfast.configs.flags import FLAGS

WORDED = [
    name
    for name in COMMANDS
    if importlib.util.find_spec(f"{commandline.__name__}.{name.replace('-', '_')}")
]
HEAVY = ("torch", "timm", "accelerate", "transformers", "cv2")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Status and error of a command line."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], *([name, "--help"] for name in WORDED)]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY} if m in sys.modules]))\n"
        f"from kdfast.__main__ import main\nmain({words})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    if words[-1] == "--help":
        _, _, examples = done.stdout.partition("examples:\n")
        assert examples.count("  kdfast ") >= 2


@pytest.mark.parametrize("name", WORDED)
def test_words_and_examples_fit_into_a_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) >= 80] == []
    paragraphs = text.split("\n\n")
    commands = paragraphs[-1].replace(" \\\n      ", " ").splitlines()[1:]
    assert all(line.startswith("  kdfast ") for line in commands)
    with monkeypatch.context() as wide:
        wide.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit):
            main([name, "--help"])
    assert capsys.readouterr().out.strip().splitlines()[-len(commands) :] == commands


@pytest.mark.parametrize(
    "words", [[], *(["data", word] for word in ("check", "infos", "sample"))], ids=" ".join
)
def test_more_help_fits_into_a_terminal(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80


# Options that say nothing about what happens without them: then they do nothing.
SILENT = {
    *("--model", "--checkpoint", "--after", "--heads", "--patch", "--pruned", "--skip", "--limit"),
    *("--config", "--set", "--resume", "--help-keys", "--teacher-checkpoint", "--max-steps"),
    *("--student-checkpoint", "--teacher", "--student", "--data", "--relation-heads", "--sweep"),
    *("--speedup", "--latency-ms", "--vram", "--gpu", "--images", "--split-file", "--train"),
    *("--val", "--out", "--only"),
}


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of a command that take a value and may be left out, those of its commands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from options(inner)
        elif action.option_strings and action.nargs != 0 and not action.required:
            yield action


@pytest.mark.parametrize("name", WORDED)
def test_help_names_every_default(name: str) -> None:
    module = importlib.import_module(f"{commandline.__name__}.{name.replace('-', '_')}")
    parser = module.parser()
    text = " ".join(parser.format_help().split())
    for action in options(parser):
        if name == "train" and action.option_strings[0].removeprefix("--") in FLAGS:
            continue  # the config has the defaults
        flag = action.option_strings[0]
        shown = parser._get_formatter()._expand_help(action) if action.help else ""
        if action.default in (None, []):
            assert "[" in shown or flag in SILENT, f"{flag}: {shown}"
        else:
            assert "[" in shown, f"{flag}: {shown}"
    assert "if left out" not in text


def test_module_of_train_answers_without_torch() -> None:
    code = "import sys, runpy; sys.argv = ['train', '--help']\n"
    code += "try: runpy.run_module('kdfast.train', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"kdfast {__version__}\n"


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(f"    {name}" in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_modules_with_main(name: str) -> None:
    module = COMMANDS[name].module
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not in this checkout")
    assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["trian"], "'trian' is no command"),
        (["trian"], "did you mean train?"),
        (["train"], "--config: must be one of orion50, "),
        (["train", "--config", "smoke", "extra"], "'extra' belongs to no option"),
        (["train", "--confg", "smoke"], "--confg: unknown option; did you mean --config?"),
        (["train", "--learning-rate", "1"], "--learning-rate: unknown option; did you mean --lr?"),
        (["train", "--num_workers", "1"], "did you mean --workers?"),
        (["train", "--num-train-epochs", "1"], "did you mean --epochs?"),
        (["train", "--amp"], "did you mean --precision?"),
        (["train", "--data-dir", "x"], "did you mean --data?"),
        (["train", "--output-dir", "x"], "did you mean --output?"),
        (["train", "--weight-decay", "1"], "did you mean --set optim.weight_decay=VALUE?"),
        (["train", "--max-grad-norm", "1"], "did you mean --set optim.clip=VALUE?"),
        (
            ["train", "--gradient-checkpointing"],
            "did you mean --set checkpointing=VALUE or --set run.checkpointing=VALUE?",
        ),
        (["train", "--help-keys", "nonsense"], "no key begins with 'nonsense'"),
        (["plan", "--vrm", "6"], "--vrm: unknown option; did you mean --vram?"),
        (["plan", "--vram", "six"], "must be a size such as 6GiB, got 'six'"),
        (["data", "sample", "--out", "x", "--clps", "3"], "did you mean --clips?"),
        (["data", "sample", "--out", "x", "--size", "9"], "argument --size: expected 2 arguments"),
        (["data", "smple"], "invalid choice: 'smple'"),
        (["train", "--help-keys", "optmi"], "no key begins with 'optmi'; did you mean optim?"),
        (["train", "--config", "smoke", "--help-keys", "lr"], "did you mean optim.lr?"),
        (["compare", "--only", "eagre"], "must be of eager, "),
        (["compare", "--only", "kdfst"], "got 'kdfst'; did you mean kdfast?"),
        (["distill", "--data", "x"], "--teacher, --student: must be given, or --config"),
        (["attention", "--weights", "x", "--image", "y"], "did you mean --checkpoint?"),
    ],
)
def test_errors(words: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, *words)
    assert status == 2
    assert answer in text and text.startswith("error: ") and "usage:" not in text


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "--model", "vit_tiny_patch16_224", "--keep", "0.5", "--out", "half"],
        ["compare", "--model", "vit_tiny_patch16_224"],
        ["attention", "--model", "vit_tiny_patch16_224", "--image", "a.png", "--output", "maps"],
        ["data", "check", "--root", "data"],
    ],
    ids=lambda words: words[0],
)
def test_commands_of_one_process_refuse_several(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, error = said(capsys, *words)
    assert status == 2
    assert "error: runs in one process, got 2 (WORLD_SIZE); start it without torchrun" in error


@pytest.mark.parametrize(
    ("text", "size"), [("6", 6 << 30), ("1.5G", 3 << 29), ("6000MiB", 6000 << 20), ("2TB", 2 << 40)]
)
def test_size_without_a_unit_is_gib(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "6 apples"])
def test_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a size"):
        size_of(text)


def test_words_are_those_of_the_libraries() -> None:
    """The parsers import no library, so what they know of it stands there once more."""
    from kdfast.data.orion.sample import SampleOptions
    from kdfast.pictures.rollout import FUSIONS
    from kdfast.pruning.scores import METHODS
    from kdfast.rivals import RIVALS

    assert {name: rival.about for name, rival in RIVALS.items()} == compare.CANDIDATES
    assert attention.FUSIONS == FUSIONS
    assert prune.METHODS == METHODS
    standard = SampleOptions()
    assert standard.size == data.SIZE
    assert {name: getattr(standard, name) for name in data.SAMPLE} == data.SAMPLE


def test_import_of_the_package_is_light_and_complete() -> None:
    code = (
        "import sys, kdfast\nassert 'torch' not in sys.modules\n"
        "assert set(kdfast.__all__) <= set(dir(kdfast))\n"
        "from kdfast import kd_loss\nimport torch\nassert torch.ops.kdfast.kd_loss\n"
        "try: kdfast.nothing\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "module 'kdfast' has no attribute 'nothing'\n", done.stderr


def test_ops_are_registered_at_once_where_torch_is() -> None:
    code = "import torch, kdfast; print(torch.ops.kdfast.pruned_attention.default)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "kdfast.pruned_attention.default\n", done.stderr
