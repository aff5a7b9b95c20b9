# SPDX-License-Identifier: Apache-2.0
"""Flags of ``kdfast train``, names of other trainers, and defaults that follow from the user's."""

from pathlib import Path

import pytest

from kdfast.configs import ChainConfig, Config, ConfigError, load
from kdfast.configs.fields import keys
from kdfast.configs.flags import FLAGS, key_of
from kdfast.configs.folder_kind import chain_kind, view_kind
from kdfast.configs.key_help import attributes, described, key_help
from kdfast.configs.synonyms import _ROWS, is_key, unknown

KNOWN = {kind: keys(kind) for kind in (ChainConfig, Config)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chain(*changes: str) -> ChainConfig:
    config = load("vit_chain_digits", changes)
    assert isinstance(config, ChainConfig)
    return config


def problems(name: str, *changes: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(name, changes)
    return caught.value.problems


def test_every_flag_has_a_key_or_a_reason() -> None:
    for name in FLAGS:
        for kind, known in KNOWN.items():
            key = key_of(name, kind)
            assert key in known or " " in key, name


def test_every_synonym_means_a_key_or_says_why_not() -> None:
    for names, *meanings in _ROWS:
        for answer, known in zip(meanings, KNOWN.values(), strict=True):
            assert is_key(answer, known) or " " in answer, (names, answer)


def test_flags_of_a_chain() -> None:
    config = chain(
        *("--epochs=2", "--batch-size=4", "--lr=1e-3", "--warmup-epochs=1", "--workers=0"),
        *(
            "--precision=fp32",
            "--seed=7",
            "--stage=teacher",
            "--output=out",
            "--no-deterministic=false",
        ),
        "--mixed-precision=bf16",
    )
    assert (config.epochs, config.batch, config.optim.lr, config.seeds) == (2, 4, 1e-3, (7,))
    assert (config.optim.warmup_epochs, config.data.workers, config.stage) == (1, 0, "teacher")
    assert (config.precision, config.output, config.deterministic) == ("bf16", "out", False)


def test_flags_of_a_pruning_run() -> None:
    config = load("smoke", ["--epochs=2", "--batch-size=3", "--lr=1e-3", "--seed=7"])
    assert isinstance(config, Config)
    assert (config.run.epochs, config.run.batch_size, config.seed) == (2, 3, 7)
    assert config.optim.lr == 1e-3


def test_the_last_one_wins() -> None:
    assert chain("--epochs=3", "epochs=4").epochs == 4
    assert chain("epochs=4", "--epochs=3").epochs == 3


def test_other_words_for_a_precision() -> None:
    assert chain("--mixed-precision=no").precision == "fp32"
    assert chain("--precision=bfloat16").precision == "bf16"


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--warmup-epochs=1", "--warmup-epochs: a pruning run counts its warm-up in steps"),
        ("--pretrained=pretrained", "--set teacher.checkpoint=FILE"),
        ("--stage=teacher", "--stage: a pruning run has no stages"),
    ],
)
def test_a_pruning_run_says_what_it_has_instead(flag: str, answer: str) -> None:
    assert any(answer in line for line in problems("smoke", flag))


@pytest.mark.parametrize(
    ("name", "in_chain", "in_run"),
    [
        ("pretrained", "init=pretrained", "teacher.checkpoint"),
        ("dataset", "data.kind", "data.kind"),
        ("data_dir", "data.root", "data.root"),
        ("learning_rate", "optim.lr", "optim.lr"),
        ("optim.learning-rate", "optim.lr", "optim.lr"),
        ("num_train_epochs", "epochs", "run.epochs"),
        ("training.batch_size", "batch", "run.batch_size"),
        ("model_teacher", "chain", "teacher.checkpoint"),
        ("gradient_checkpointing", "checkpointing", "run.checkpointing"),
        ("num_worker", "data.workers", "data.workers"),
    ],
)
def test_synonyms(name: str, in_chain: str, in_run: str) -> None:
    for kind, answer in ((ChainConfig, in_chain), (Config, in_run)):
        line = unknown(name, kind, KNOWN[kind])
        assert line == f"{name}: unknown key; did you mean {answer}?"


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ("model_args={depth:2}", "--set 'model_args={depth: 2}', got {depth:2}"),
        ("model_args=[{depth:2}, {}]", "--set 'model_args=[{depth: 2}, {}]'"),
        ("distill={alpha:0.5,temperature:2}", "--set 'distill={alpha: 0.5,temperature: 2}'"),
    ],
)
def test_a_colon_without_a_space_is_said(change: str, meant: str) -> None:
    (line,) = problems("vit_chain", change)
    assert "YAML wants a space after each colon: " in line and meant in line


def test_colons_elsewhere_are_none_of_its_business() -> None:
    config = load("vit_chain_digits", ["model_args={depth: 2}", "output=a:b"])
    assert isinstance(config, ChainConfig)
    assert (config.model_args[0], config.output) == ({"depth": 2}, "a:b")


def test_a_synonym_that_is_no_key() -> None:
    line = unknown("keep_ratio", ChainConfig, KNOWN[ChainConfig])
    assert line.startswith("keep_ratio: unknown key; a chain prunes nothing")
    assert unknown("zzz", Config, KNOWN[Config]) == "zzz: unknown key"


def test_kind_of_a_folder(tmp_path: Path) -> None:
    assert chain_kind("gone") is None and view_kind("gone") is None
    for name, kind in (
        ("a/cifar-10-batches-py/x", "cifar10"),
        ("b/cifar-100-python.tar.gz", "cifar100"),
        ("c/pathmnist_64.npz", "pathmnist"),
        ("d/data/train-0.parquet", "parquet"),
        ("e/train/cat/1.png", "imagefolder"),
        ("f.tar", "imagefolder"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert chain_kind(str(tmp_path / name.split("/")[0])) == kind
    for name, kind in (
        ("g/kdfast_infos_train", "frames"),
        ("h/v1", "bench2drive"),
        ("i", "images"),
    ):
        (tmp_path / name).mkdir(parents=True)
        assert view_kind(str(tmp_path / name.split("/")[0])) == kind


def test_data_sets_its_kind_unless_the_user_does(tmp_path: Path) -> None:
    (tmp_path / "mine" / "cat").mkdir(parents=True)
    config = load("vit_chain", ["--data=mine"])
    assert isinstance(config, ChainConfig)
    assert (config.data.root, config.data.kind, config.note) == ("mine", "imagefolder", "")
    for flag in ("--dataset=parquet", "data.kind=parquet"):
        assert load("vit_chain", [flag, "--data=mine"]).data.kind == "parquet"
    with pytest.raises(ConfigError, match="--data: there is no folder or file mien$"):
        load("vit_chain", ["--data=mien"])
    load("vit_chain", ["--data=mien"], files=False)


def test_another_kind_leaves_the_default_folder() -> None:
    config = load("vit_chain", ["data.kind=pathmnist"])
    assert config.data.root is None


def test_medmnist_needs_its_set() -> None:
    config = load("vit_chain", ["data.kind=medmnist", "data.set=pathmnist", "data.root=x"])
    assert isinstance(config, ChainConfig) and config.data.set == "pathmnist"
    assert problems("vit_chain", "data.kind=medmnist")[0].startswith("data.set: must name the set")
    assert problems("vit_chain", "data.kind=parquet", "data.set=x")[0].startswith("data.set: must")


def test_lists_follow_the_chain() -> None:
    two = chain("chain=[vit_base_patch16_224,vit_tiny_patch16_224]")
    default = chain()
    assert two.model_args == (default.model_args[0], default.model_args[2])
    assert two.epochs == (14, 30)
    other = load("vit_chain", ["chain=[resnet18,vit_tiny_patch16_224]", "data.kind=cifar10"])
    assert isinstance(other, ChainConfig)
    assert (other.batch, other.model_args) == ((8, 32), ())
    mixed = chain("chain=[resnet18,vit_tiny_patch16_224]")
    assert mixed.model_args == ({}, default.model_args[2])
    one = load("vit_chain", ["chain=[resnet18]", "data.kind=cifar10"])
    assert isinstance(one, ChainConfig) and one.batch == (8,)
    four = load("vit_chain", ["chain=[a,b,c,d]", "data.kind=cifar10"])
    assert isinstance(four, ChainConfig) and len(four.batch) == 4  # type: ignore[arg-type]
    own = load("vit_chain", ["chain=[a,b]", "batch=[1,2]", "data.kind=cifar10"])
    assert isinstance(own, ChainConfig) and own.batch == (1, 2)
    assert "batch: must have one entry" in problems("vit_chain", "chain=[a,b]", "batch=[1,2,3]")[0]


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    assert chain().precision == "bf16"
    assert chain("device=cpu").precision == "fp32" and chain("precision=fp32").precision == "fp32"
    config = load("smoke")
    assert isinstance(config, Config) and config.run.precision == "bf16"
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    assert chain().precision == "fp32"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert chain().precision == "fp32"
    assert load("vit_chain", files=False).precision == "auto"  # type: ignore[union-attr]


def test_every_key_is_explained() -> None:
    for kind in (ChainConfig, Config):
        for key in described(kind):
            assert key.meaning or ".model." in key.name, key.name
    assert attributes(ChainConfig)["init"].startswith("Per link: scratch, pretrained")


def test_key_help() -> None:
    text = key_help(load("smoke"), "run.epochs")
    assert text == "run.epochs = 2\n    Passes over the training data. [whole number, from 1]"
    assert key_help(load("smoke"), "nothing") == ""
    lines = key_help(load("vit_chain_digits")).splitlines()
    assert all(len(line) <= 80 for line in lines if line.startswith(" "))
