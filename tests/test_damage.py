# SPDX-License-Identifier: Apache-2.0
"""A sample of what ``python -m kdfast.testing.damage`` tries, and that it finds faults."""

import io
import json
import os
import pickle
import random
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import kdfast
from kdfast.configs.fields import ConfigError
from kdfast.configs.load import load
from kdfast.data.files import decode_bgr
from kdfast.machine.bounded import Size, bounded, check_counts
from kdfast.machine.disk import DiskFull, require_writable, room_for
from kdfast.machine.files import load_torch, replacing
from kdfast.machine.limits import MAX_PIXELS
from kdfast.sources import SourceError, load_model
from kdfast.testing.damage import bombs, disks, edits, flips
from kdfast.testing.damage.__main__ import main
from kdfast.testing.damage.models import MAKERS, saved
from kdfast.testing.damage.tally import BAIT, OPENED, OUTSIDE, Tally, differs, watch_opened
from kdfast.train import main as train
from kdfast.trainer.commits import save_checkpoint

ALL = list(flips.subjects())


@pytest.mark.parametrize("number", range(len(ALL)))
def test_flipped_bits_are_seen(tmp_path: Path, number: int) -> None:
    tally = Tally()
    flips.flip(tally, ALL[number], tmp_path, 10, random.Random(number))
    assert not tally.faults, tally.faults
    assert sum(tally.counts[ALL[number].kind].values()) == 20


@pytest.mark.parametrize("name", MAKERS)
def test_edited_folders_are_refused(tmp_path: Path, name: str) -> None:
    tally = Tally()
    edits.edited_json(tally, tmp_path, name, 5, random.Random(1))
    edits.edited_tensors(tally, tmp_path, name, 14, random.Random(1))
    assert not tally.faults, tally.faults


def test_hostile_folders_are_refused(tmp_path: Path) -> None:
    watch_opened()
    tally = Tally()
    edits.hostile_files(tally, tmp_path)
    assert not tally.faults, tally.faults
    assert tally.counts["folders"]["seen"] > 15


@pytest.mark.parametrize("make", [bombs.archives, bombs.configs])
def test_bombs_are_refused(tmp_path: Path, make: Any) -> None:
    tally = Tally()
    make(tally, tmp_path)
    assert not tally.faults, tally.faults


@pytest.mark.slow
def test_picture_bombs_are_refused(tmp_path: Path) -> None:
    tally = Tally()
    bombs.pictures(tally, tmp_path)
    assert not tally.faults, tally.faults


@pytest.mark.slow
def test_the_command_finds_no_fault(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["flips", "edits", "disks", "--flips", "60", "--edits", "40", "--seed", "7"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["damage", *arguments])
        assert main() == 0, capfd.readouterr().out


@pytest.mark.parametrize("name", disks.WRITERS)
def test_a_full_disk_is_said(tmp_path: Path, name: str) -> None:
    tally = Tally()
    disks.full(tally, tmp_path, [0, 4096], [name])
    assert not tally.faults, tally.faults
    assert tally.counts["full disk"]["seen"] >= 1


def test_files_follow_the_umask(tmp_path: Path) -> None:
    tally = Tally()
    disks.permissions(tally, tmp_path)
    assert not tally.faults, tally.faults
    assert tally.counts["permissions"]["tried"] > 40


def test_faults_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch_opened()
    tally = Tally()

    def unclear() -> None:
        raise KeyError("x")

    def nameless() -> None:
        raise ValueError("is damaged")

    def opens() -> None:
        (tmp_path / BAIT).write_text("x")
        raise ValueError(f"{tmp_path} is damaged")

    wanted = torch.ones(2)
    for read in (unclear, nameless, opens, lambda: torch.zeros(2), lambda: wanted.double()):
        before = len(tally.faults)
        tally.trial("kind", "text", read, differs(wanted), str(tmp_path))
        assert len(tally.faults) == before + 1, read
    tally.trial("kind", "text", lambda: wanted.clone(), differs(wanted))
    assert tally.counts["kind"]["harmless"] == 1 and tally.counts["kind"]["faults"] == 5
    assert "| kind | 6 | 2 | 1 | 5 |" in tally.table()
    assert "FAULT kind: text" in capsys.readouterr().out


def test_disk_full_says_what_and_where(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(DiskFull, match=r"a.bin: no space left, it needs more than 4 bytes and "):
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError("unexpected pos") from OSError(28, "No space left on device")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    with pytest.raises(RuntimeError, match="other"), room_for(path):
        raise RuntimeError("other")


def test_what_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.machine.disk.free_bytes", lambda folder: 1000)
    with pytest.raises(DiskFull, match=r"model.safetensors: no space left, it needs \d{3},\d{3} "):
        kdfast.save_pretrained(MAKERS["timm"](), tmp_path)
    weight = torch.zeros(300)
    with pytest.raises(DiskFull, match=r"last.pt: .* needs 1,200 bytes and 1,000 are free"):
        save_checkpoint(tmp_path, {"a": [weight, weight[:5]], "step": 1})
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written_are_found_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cache_dir: .*file/a cannot be written: Not a directory"):
        require_writable(tmp_path / "file" / "a", "cache_dir")
    require_writable(tmp_path / "a" / "b", "cache_dir")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_replacing_leaves_the_umask_of_other_threads_alone(tmp_path: Path) -> None:
    before = os.umask(0o027)
    seen: list[int] = []

    def other() -> None:
        for number in range(50):
            path = tmp_path / f"other{number}"
            path.write_text("x")
            seen.append(stat.S_IMODE(path.stat().st_mode))

    try:
        thread = threading.Thread(target=other)
        thread.start()
        for _ in range(50):
            with replacing(tmp_path / "mine.safetensors") as partial:
                save_file({"x": torch.zeros(2)}, partial)
        thread.join()
    finally:
        os.umask(before)
    assert set(seen) == {0o640}
    assert stat.S_IMODE((tmp_path / "mine.safetensors").stat().st_mode) == 0o640


def test_limits_have_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bombs.png(200, 200)
    assert not isinstance(decode_bgr(data), str)
    monkeypatch.setenv(MAX_PIXELS.name, "100")
    assert "40,000 pixels" in decode_bgr(data) and MAX_PIXELS.name in decode_bgr(data)
    for bad in ("0", "-1", "x", "1e9", ""):
        monkeypatch.setenv(MAX_PIXELS.name, bad)
        with pytest.raises(ValueError, match=f"{MAX_PIXELS.name}: must be a whole number"):
            decode_bgr(data)
    monkeypatch.setenv("KDFAST_MAX_YAML", "5")
    with pytest.raises(ConfigError, match="KDFAST_MAX_YAML changes that"):
        load("smoke", ["run.epochs=[1, 2, 3, 4, 5, 6]"])


def test_a_model_ends_being_built_that_its_file_cannot_fill(tmp_path: Path) -> None:
    size = Size(tmp_path / "w", bytes=1000, tensors=2)
    with pytest.raises(ValueError, match="parts for the 2 tensors"), bounded(size):
        torch.nn.ModuleList(torch.nn.ReLU() for _ in range(10**6))
    with pytest.raises(ValueError, match="bytes for the 1,000"), bounded(size):
        torch.nn.Linear(10**6, 10**6, device="meta")
    torch.nn.Linear(4, 4)  # outside of the context nothing is counted
    for values in ({"a": {"depth": 10**3}}, {"num_labels": 10**8}, {"x": float("inf")}):
        with pytest.raises(ValueError, match="must be"):
            check_counts(values, size)
    check_counts({"depth": 12, "num_labels": 21_841, "x": [1, -1, True, None, "a"]}, size)


@pytest.mark.parametrize("name", ["depth", "num_hidden_layers"])
def test_depth_is_no_way_to_take_all_memory(tmp_path: Path, name: str) -> None:
    kind = "transformers" if name.startswith("num") else "timm"
    saved(kind, tmp_path, foreign=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if name in config else config["model_args"])[name] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json must describe a model: .*{name} must be"):
        kdfast.load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int32])
def test_weights_of_other_kinds_are_not_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    saved("timm", tmp_path, foreign=True)
    state = load_file(tmp_path / "model.safetensors")
    state["norm.weight"] = state["norm.weight"].to(dtype)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight must be of float64, float32, bfloat16"):
        kdfast.load_pretrained(tmp_path)


def test_models_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = MAKERS["timm"]()
    model.get_parameter("norm.weight").data[0] = float("nan")
    with pytest.raises(ValueError, match=r"must be finite, got others in \['norm.weight'\]"):
        kdfast.save_pretrained(model, tmp_path)


def test_checkpoints_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_torch(tmp_path / "a.pt")["w"].tolist() == [1.0, 1.0, 1.0]


def test_files_of_a_hugging_face_cache_are_links(tmp_path: Path) -> None:
    """They lie in blobs, and snapshots hold links to them."""
    folder = tmp_path / "snapshots" / "revision"
    saved("transformers", folder, foreign=True)
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        target = tmp_path / "blobs" / path.name
        path.rename(target)
        path.symlink_to(target)
    kdfast.load_pretrained(folder)


def test_folders_with_several_files_of_weights_are_read(tmp_path: Path) -> None:
    saved("transformers", tmp_path, foreign=True)
    whole = tmp_path / "model.safetensors"
    want = kdfast.load_pretrained(tmp_path).state_dict()
    state, places = load_file(whole), {}
    for part, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        save_file({name: state[name] for name in names}, tmp_path / f"part{part}.safetensors")
        places |= dict.fromkeys(names, f"part{part}.safetensors")
    whole.unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = kdfast.load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(want[name], found[name]) for name in want)


def a_link(**changes: Any) -> dict[str, Any]:
    """What a chain keeps of a link, as far as its model needs it."""
    torch.manual_seed(0)
    model = MAKERS["timm"]()
    sizes = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3}
    weights = {f"student.net.{name}": x for name, x in model.state_dict().items()}
    link = {"model": "vit_tiny_patch16_224", "args": sizes, **changes}
    return {"meta": {"link": link, "data": {"classes": list(range(7))}}, "module": weights}


@pytest.mark.parametrize(
    "changes",
    [
        {"args": {"depth": 10**9}},
        {"args": {"checkpoint_path": OUTSIDE}},
        {"args": {"pretrained": True}},
        {"args": {"pretrained_cfg": {"file": OUTSIDE}}},
        {"args": {"depth": -1}},
        {"args": {"img_size": "x"}},
        {"args": None},
        {"model": f"hf-hub:{BAIT}/{BAIT}"},
        {"model": f"local-dir:{OUTSIDE}"},
        {"model": ["vit_tiny_patch16_224"]},
    ],
)
def test_links_of_others_open_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    watch_opened()
    path = tmp_path / "best.pt"
    torch.save(a_link(), path)
    assert isinstance(load_model(None, str(path)), torch.nn.Module)
    torch.save(a_link(**changes), path)
    OPENED.clear()
    with pytest.raises(SourceError, match="best.pt must") as caught:
        load_model(None, str(path))
    assert not OPENED and len(str(caught.value)) < 1000


def test_pickled_weights_of_hugging_face(tmp_path: Path) -> None:
    saved("transformers", tmp_path, foreign=True)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    load_model(f"hf:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="must hold model.safetensors"):
        kdfast.load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": edits.Bait()}))
    with pytest.raises(SourceError, match="pytorch_model.bin must"):
        load_model(f"hf:{tmp_path}")


@pytest.mark.parametrize("form", ["png", "webp", "tiff"])
def test_of_animated_pictures_the_first_is_read(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    found = decode_bgr(file.getvalue())
    assert not isinstance(found, str) and found.shape == (8, 8, 3)
    assert found[0, 0, 2] > 200 and found[0, 0, 0] < 50


@pytest.mark.parametrize("key", ["cache_dir", "report"])
def test_outputs_are_tried_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    changes = ["output=a", "cache=true", "data.variants=2", f"{key}=file/inner/x"]
    monkeypatch.setattr("kdfast.chain.run.read_data", lambda *_: pytest.fail("it went on"))
    arguments = ["--config", "vit_chain_digits", *(x for c in changes for x in ("--set", c))]
    assert train(arguments) == 2
    assert f"{key}: " in (error := capsys.readouterr().err) and "cannot be written" in error


@pytest.mark.parametrize("value", ["x", [1], {}, True, float("inf")])
def test_attributes_keep_their_kind(tmp_path: Path, value: Any) -> None:
    saved("timm", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["kdfast"]["attributes"] = {"blocks.0.norm1": {"eps": value}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json must"):
        kdfast.load_pretrained(tmp_path, verify=False)
