# SPDX-License-Identifier: Apache-2.0
"""The typed config: recipe values, overrides, errors, files, and the embedded default."""

from pathlib import Path

import pytest

from kdfast.configs import CONFIGS, ConfigError, load, plain, save
from kdfast.configs.fields import Range, keys
from kdfast.configs.recovery import Config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inputs(here: Path) -> Path:
    """A working folder with both default inputs of orion50."""
    (here / "ckpts/orion").mkdir(parents=True)
    (here / "ckpts/orion/orion.pth").touch()
    (here / "data/bench2drive").mkdir(parents=True)
    return here


def problems(source: str, *changes: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(source, changes)
    return caught.value.problems


def test_recipe(inputs: Path) -> None:
    config = load("orion50")
    assert config.note == ""
    assert config.teacher.checkpoint == "ckpts/orion/orion.pth"
    assert (config.data.kind, config.data.root) == ("bench2drive", "data/bench2drive")
    assert config.data.size == (640, 640) and config.data.gridmask == 0.7
    assert (config.prune.keep, config.prune.scope) == (0.5, "block")
    distill = config.distill
    assert (distill.alpha_warmup, distill.warmup_epochs, distill.alpha) == (0.8, 1, 0.6)
    assert (distill.feature, distill.attention, distill.output) == (0.5, 0.3, 0.2)
    assert distill.temperature == 3.0 and distill.drop_path == 0.0
    optim = config.optim
    assert (optim.lr, optim.betas, optim.weight_decay) == (2e-4, (0.9, 0.999), 0.01)
    assert (optim.warmup, optim.warmup_ratio, optim.min_ratio, optim.clip) == (500, 0.1, 0.01, 10)
    assert config.run.epochs == 3


def test_overrides(here: Path) -> None:
    config = load(
        "smoke",
        [
            "optim.lr=1e-4",  # a string to YAML
            "optim.clip=null",
            "run.epochs=7",
            "run.epochs=5",
            "data.size=[64, 32]",
            "distill.feature_layers=[0, 1]",
            "teacher.fit.model.depth=2",
            "run={batch_size: 3, accumulate: 2}",
        ],
    )
    assert config.optim.lr == 1e-4 and config.optim.clip is None
    assert config.run.epochs == 5
    assert config.data.size == (64, 32)
    assert config.distill.feature_layers == (0, 1)
    assert config.teacher.fit is not None and config.teacher.fit.model.depth == 2
    assert (config.run.batch_size, config.run.accumulate) == (3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distil.alpha=1", "distil.alpha: unknown key; did you mean distill.alpha?"),
        ("learning_rate=1", "learning_rate: unknown key"),
        ("temperature=1", "temperature: unknown key; did you mean distill.temperature?"),
        ("run.epoch=1", "run.epoch: unknown key; did you mean run.epochs?"),
        ("run={epoch: 1}", "run.epoch: unknown key; did you mean run.epochs?"),
        ("name=x", "name: unknown key"),
        ("run.epochs", "--set run.epochs: must be key=value"),
        ("run.epochs=0", "run.epochs: must be at least 1, got 0"),
        ("run.epochs=1.5", "run.epochs: must be an integer, got 1.5"),
        ("run.epochs=true", "run.epochs: must be an integer, got True"),
        ("run.epochs=null", "run.epochs: must be an integer, got None"),
        ("optim.lr=fast", "optim.lr: must be a number, got 'fast'"),
        ("optim.lr=0", "optim.lr: must be above 0, got 0"),
        ("optim.lr=.nan", "optim.lr: must be finite, got nan"),
        ("optim.betas=[0.9, 1]", "optim.betas: must be below 1, got [0.9, 1]"),
        ("optim.betas=0.9", "optim.betas: must be a list such as [1, 2], got 0.9"),
        ("data.size=[32]", "data.size: must be a list of 2, got [32]"),
        ("distill.alpha=1.1", "distill.alpha: must be at most 1, got 1.1"),
        ("run.precision=bf15", "run.precision: must be one of auto, fp32, bf16, fp16, got 'bf15'"),
        ("run.checkpointing=1", "run.checkpointing: must be true or false, got 1"),
        ("run=5", "run: must be a section with keys, got 5"),
        ("data.augment=true", "data.cache: needs data.augment false, got true"),
        ("teacher.fit=null", "teacher.checkpoint: must name a file, or teacher.fit say how"),
        ("data.kind=images", "data.root: images needs a folder"),
    ],
)
def test_rejects(change: str, message: str, here: Path) -> None:
    assert any(line.startswith(message) for line in problems("smoke", change))


def test_all_problems_at_once(here: Path) -> None:
    found = problems("smoke", "run.epochs=0", "distil.alpha=1", "optim.lr=x", "nonsense")
    assert [line.split(":")[0] for line in found] == [
        "distil.alpha",
        "--set nonsense",
        "optim.lr",
        "run.epochs",
    ]
    with pytest.raises(ConfigError, match=r"^config: 2 problems\n  - .*\n  - .*$"):
        load("smoke", ["run.epochs=0", "optim.lr=x"])


def test_unknown_config(here: Path) -> None:
    assert problems("orion51")[0].startswith("name: must be one of orion50, ")
    assert problems("vit_chian")[0].endswith("got 'vit_chian'; did you mean vit_chain?")
    assert problems("mine.yml.txt")[0].endswith("got 'mine.yml.txt' (a file ends in .yaml)")
    assert problems("absent.yaml") == ["--config: no such file: absent.yaml"]


def test_fp16_needs_gpu(here: Path) -> None:
    lines = problems("smoke", "run.precision=fp16", "run.device=cpu")
    assert lines == ["run.precision: fp16 needs a GPU for loss scaling; use bf16 or fp32"]


def test_yaml_round_trip(here: Path) -> None:
    config = load("smoke", ["optim.lr=3e-7", "optim.clip=null", "distill.feature_layers=[1]"])
    save(config, here / "config.yaml")
    assert load("config.yaml") == config
    assert load("config.yaml", ["seed=4"]).seed == 4


def test_yaml_starts_from_name(here: Path) -> None:
    (here / "mine.yaml").write_text("name: smoke\nrun: {epochs: 9}\nteacher.x: 1\n")
    assert problems("mine.yaml") == ["teacher.x: unknown key; did you mean teacher?"]
    (here / "mine.yaml").write_text("name: smoke\nrun: {epochs: 9}\n")
    config = load("mine.yaml", ["run.batch_size=2"])
    assert (config.run.epochs, config.run.batch_size, config.data.size) == (9, 2, (32, 32))
    (here / "mine.yaml").write_text("run: {epochs: 9}\n")
    assert problems("mine.yaml")[0].startswith("name: must be one of")
    (here / "mine.yaml").write_text("a: [")
    assert problems("mine.yaml")[0].startswith("--config: mine.yaml is not YAML")


def test_stand_in(here: Path) -> None:
    """Both inputs absent and neither named: the embedded default, which says so when saved."""
    config = load("orion50", ["run.epochs=2"])
    assert config.data.kind == "scenes" and config.teacher.checkpoint is None
    assert config.run.epochs == 2 and config.output == "runs/orion50"
    assert config.note.startswith("EMBEDDED DEFAULT: no ckpts/orion/orion.pth and data/bench2drive")
    save(config, here / "config.yaml")
    assert "# EMBEDDED DEFAULT" in (here / "config.yaml").read_text()
    assert load("config.yaml") == config
    assert load("orion50", ["data.kind=scenes"]).name == "orion50_scenes"


def test_infos_bring_the_heads_in(inputs: Path) -> None:
    plain = load("orion50", ["teacher.checkpoint=ckpts/orion/orion.pth"])
    assert plain.name == "orion50" and not plain.note
    for name in ("kdfast_infos_train", "kdfast_infos_val", "kdfast_maps"):
        (inputs / "data" / "bench2drive" / name).mkdir()
    config = load("orion50")
    assert config.name == "orion50_frames" and config.data.kind == "frames"
    assert "loss of ORION's heads" in config.note
    assert load("orion50", ["data.kind=bench2drive"]).data.kind == "bench2drive"


def test_stand_in_has_the_same_kind_of_blocks() -> None:
    fit = CONFIGS["orion50_scenes"]().teacher.fit
    assert fit is not None
    model = fit.model
    assert model.num_heads == 16
    grid = model.img_size // model.patch_size
    assert grid % model.window_size, "windows must have pads"
    blocks = set(range(model.depth)) - set(model.window_block_indexes)
    assert len(blocks) >= 2 and model.depth - 1 in blocks


def test_no_stand_in_for_half_of_the_inputs(inputs: Path) -> None:
    (inputs / "ckpts/orion/orion.pth").unlink()
    assert problems("orion50") == ["teacher.checkpoint: no such file: ckpts/orion/orion.pth"]
    (inputs / "ckpts/orion/orion.pth").touch()
    (inputs / "data/bench2drive").rmdir()
    assert problems("orion50") == ["data.root: no such folder: data/bench2drive"]
    # Scenes were asked for, so the checkpoint is what the user wants to use with them.
    assert load("orion50", ["data.kind=scenes"]).teacher.checkpoint == "ckpts/orion/orion.pth"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            ["teacher.checkpoint=gone.pth"],
            ["teacher.checkpoint: no such file: gone.pth", "data.root: no such folder: data/be"],
        ),
        (
            ["data.kind=images", "data.root=gone"],
            ["teacher.checkpoint: no such file: ckpts/", "data.root: no such folder: gone"],
        ),
        (["data.root=gone"], ["teacher.checkpoint: no such", "data.root: no such folder: gone"]),
    ],
)
def test_a_named_path_never_falls_back(changes: list[str], expected: list[str], here: Path) -> None:
    found = problems("orion50", *changes)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


def test_plain_is_plain(here: Path) -> None:
    tree = plain(load("smoke"))
    assert tree["data"]["size"] == [32, 32]
    assert set(keys(Config)) >= {"seed", "teacher.fit.model.depth", "distill.alpha_warmup"}


@pytest.mark.parametrize(
    ("bounds", "value", "reason"),
    [
        (Range(0, 1), 0.0, None),
        (Range(0, 1), 1.0, None),
        (Range(0, 1, "(]"), 0.0, "must be above 0"),
        (Range(0, 1, "[)"), 1.0, "must be below 1"),
        (Range(0), -1.0, "must be at least 0"),
        (Range(0), float("inf"), "must be finite"),
    ],
)
def test_range(bounds: Range, value: float, reason: str | None) -> None:
    assert bounds.reason(value) == reason
