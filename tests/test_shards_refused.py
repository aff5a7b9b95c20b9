# SPDX-License-Identifier: Apache-2.0
"""Tar shards that would lose samples, or give wrong labels, are refused with the way out."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from kdfast.data.__main__ import main
from kdfast.data.labelled import build_classification
from kdfast.data.shards.labels import numbered
from kdfast.data.shards.tars import open_tars


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of shards that cannot be written beside them."""
    monkeypatch.setenv("KDFAST_CACHE", str(tmp_path / "cache"))


def written(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """A tar; text is the target of a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def refusal(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_tars("webdataset", path.parent, labelled=True)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_two_samples_of_one_key(tmp_path):
    path = tmp_path / "set/train-0.tar"
    written(path, [("a.jpg", b"1"), ("a.cls", b"0"), ("a.jpg", b"2"), ("a.cls", b"1")])
    assert f"{path}: must have one field jpg in a sample, got two in a" in refusal(path)


def test_fields_of_a_sample_that_do_not_follow_each_other(tmp_path):
    path = tmp_path / "set/train-0.tar"
    written(path, [("./b.cls", b"0"), ("./a.jpg", b"1"), ("./a.cls", b"1"), ("./b.jpg", b"2")])
    message = refusal(path)
    assert f"got cls in sample b of {path}" in message
    assert "its other files are elsewhere in the shard: pack with `tar --sort=name`" in message
    written(path, [("a.jpg", b"1"), ("a.cls", b"0"), ("b.cls", b"0")])
    assert "got cls in sample b of" in (message := refusal(path))
    assert "elsewhere" not in message


def test_links(tmp_path):
    path = tmp_path / "set/train-0.tar"
    written(path, [("note", "/x"), ("a.jpg", "/data/a.jpg"), ("a.cls", b"0")])
    message = refusal(path)
    assert f"{path}: must hold files, got a link a.jpg to /data/a.jpg" in message
    assert "tar --dereference --hard-dereference" in message


@pytest.mark.parametrize("name", ["train-0.tar", "train-0.tar.gz", "train-0.tgz"])
def test_compressed(tmp_path, name):
    path = written(tmp_path / "set" / name, [("a.jpg", b"1"), ("a.cls", b"0")])
    path.write_bytes(gzip.compress(path.read_bytes()))
    message = refusal(path)
    assert str(path) in message and "compressed" in message and "`gunzip`" in message


@pytest.mark.parametrize("end, tool", [("tar.bz2", "bunzip2"), ("tar.zst", "unzstd")])
def test_other_compressions(end, tool, tmp_path):
    path = written(tmp_path / "set" / f"train-0.{end}", [("a.jpg", b"1"), ("a.cls", b"0")])
    assert f"`{tool}` them" in refusal(path)


def test_labels_that_are_none():
    with pytest.raises(ValueError, match="every row must have one, got none in row 1"):
        numbered(["0", ""], [])
    with pytest.raises(ValueError, match="below 1,000,000, got 99999999999999999999; ids are no"):
        numbered(["0", "99999999999999999999"], [])


def test_an_empty_label_is_named(tmp_path):
    path = tmp_path / "set/train-0.tar"
    written(path, [("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"1"), ("b.cls", b" \n")])
    with pytest.raises(ValueError, match=r"data.label_key: .*train-0.tar: b.cls must hold a class"):
        build_classification("webdataset", path.parent, size=8, seed=0)


def test_a_shard_that_was_written_again_is_listed_again(tmp_path):
    path = tmp_path / "set/train-0.tar"
    for key in "ab":
        written(path, [(f"{key}.jpg", b"1"), (f"{key}.cls", b"0")])
        assert list(open_tars("webdataset", path.parent).pictures.names) == [f"{key}.jpg"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("kdfast_shards.json", '{"format": "kdfast.shards/1"}'),
        ("kdfast_shards.json", "{"),
        ("all-000000.tar.index.json", "{"),
        ("all-000000.tar.index.json", '{"a": 1}'),
    ],
)
def test_packing_goes_on_beside_a_damaged_file(tmp_path, capsys, name, content):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.jpg").write_bytes(b"1")
    words = ["shard", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    (tmp_path / "out" / name).write_text(content)
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / 'out' / name} must " in error
