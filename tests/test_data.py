# SPDX-License-Identifier: Apache-2.0
"""Datasets of files, unreadable pictures, and the order of an epoch."""

import json
import logging
import tarfile

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import kdfast.data as data
from kdfast.data.files import list_images, read_bgr
from kdfast.data.views.bench2drive import CAMERAS
from kdfast.data.views.unlabelled import is_val

SIZE = (64, 64)


def write(path, seed=0, size=(36, 64)):
    """Write a small picture in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    image = cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)
    ok, code = cv2.imencode("." + path.suffix[1:].lower(), image)
    assert ok
    path.write_bytes(code.tobytes())


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures in three folders."""
    for index in range(40):
        write(tmp_path / f"set{index % 3}" / f"{index:03d}.jpg", index)
    return tmp_path


@pytest.fixture
def drive(tmp_path):
    """Three clips of three frames; one view of clip b, frame 1, is missing."""
    root = tmp_path / "bench2drive"
    for clip in "abc":
        for frame in range(3):
            for camera in CAMERAS:
                write(root / "v1" / clip / "camera" / camera / f"{frame:05d}.jpg", frame)
    (root / "v1" / "b" / "camera" / "rgb_back" / "00001.jpg").unlink()
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"val": ["v1/c"]}))
    return root, split


def build(root, **options):
    return data.build(**{"kind": "images", "root": root, "size": SIZE, **options})


def loader(dataset, sampler, batch_size, workers):
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=data.collate,
        persistent_workers=workers > 0,
    )


def same(a, b):
    return torch.equal(a["image"], b["image"]) and a["path"] == b["path"]


def test_listing(tmp_path):
    names = ["b/2.PNG", "b/10.jpeg", "a.JPG", "B.webp", "b/c/x.bmp", "a/z.jpg"]
    for name in names:
        write(tmp_path / name)
    for name in ("b/notes.txt", ".hidden.jpg", ".cache/1.jpg", "b/._2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert list_images(tmp_path) == sorted(names)


def test_item(pictures):
    dataset = build(pictures, val_fraction=0.1)
    item = dataset[3]
    assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.float32
    assert item["index"] == 3 and item["path"].endswith(dataset.names[3])
    assert "label" not in item and dataset.views == 1
    assert same(item, dataset[3]) and not same(item, dataset[4])
    with pytest.raises(IndexError, match=r"index: must be in \[0, 36\), got 36"):
        dataset[36]


def test_every_format_reads_the_same(tmp_path):
    for suffix in ("png", "bmp", "BMP"):
        write(tmp_path / f"x.{suffix}", 4)
    images = [read_bgr(path) for path in sorted(tmp_path.iterdir())]
    assert all((image == images[0]).all() for image in images)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    np.testing.assert_array_equal(read_bgr(tmp_path / "grey.png"), np.stack([grey] * 3, -1))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "jpeg"])
def test_tiff(tmp_path, compression):
    pixels = np.kron(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5, np.ones((8, 8, 1)))
    picture = Image.fromarray(pixels.astype(np.uint8))
    quality = {"quality": 100} if compression == "jpeg" else {}
    picture.save(tmp_path / "a.tif", compression=compression, **quality)
    got = read_bgr(tmp_path / "a.tif")
    assert got.dtype == np.uint8 and got.flags.c_contiguous
    exact = {"rtol": 0, "atol": 6 if compression == "jpeg" else 0}
    np.testing.assert_allclose(got[..., ::-1].astype(int), pixels.astype(int), **exact)
    assert list_images(tmp_path) == ["a.tif"]


def test_tiff_of_other_kinds(tmp_path):
    """Grey, 16 bits, palette, alpha, big-endian and several pages; floats have no range."""
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    three = np.stack([grey] * 3, -1)
    wide = grey.astype(np.uint16) * 256 + 7
    kinds = {
        "grey": Image.fromarray(grey),
        "wide": Image.fromarray(wide),
        "palette": Image.fromarray(grey).convert("P"),
        "alpha": Image.merge("RGBA", [Image.fromarray(grey)] * 3 + [Image.new("L", (8, 8), 9)]),
    }
    for name, picture in kinds.items():
        picture.save(tmp_path / f"{name}.tiff")
        np.testing.assert_array_equal(read_bgr(tmp_path / f"{name}.tiff"), three, err_msg=name)
    pages = [Image.new("L", (4, 4), value) for value in (3, 4)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert (read_bgr(tmp_path / "pages.tif") == 3).all()
    pages[0].save(tmp_path / "big.tif", big_tiff=True)
    assert (read_bgr(tmp_path / "big.tif") == 3).all()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    assert "values of mode 'F', whose range is not known" in read_bgr(tmp_path / "float.tif")


def test_damaged_tiff_is_a_reason(tmp_path):
    write(tmp_path / "a.tif")
    code = bytearray((tmp_path / "a.tif").read_bytes())
    draw = np.random.default_rng(0)
    reasons = 0
    for _ in range(200):
        bad = code.copy()
        for place in draw.integers(0, min(len(bad), 300), 4):
            bad[place] = draw.integers(0, 256)
        (tmp_path / "bad.tif").write_bytes(bad)
        got = read_bgr(tmp_path / "bad.tif")
        reasons += isinstance(got, str)
        assert isinstance(got, str) or (got.ndim == 3 and got.dtype == np.uint8)
    assert reasons > 20
    (tmp_path / "bad.tif").write_bytes(code[: len(code) // 2])
    assert read_bgr(tmp_path / "bad.tif").startswith("cannot be decoded: ")


def test_split_of_a_plain_tree(pictures):
    train, val = build(pictures), build(pictures, split="val")
    assert len(train) == 36 and len(val) == 4
    assert sorted(train.names + val.names) == list_images(pictures)
    # Runs: 1000 files in runs of 16, every tenth run is validation.
    chosen = [i for i in range(1000) if is_val(i, 1000, 0.1)]
    assert chosen[:17] == [*range(144, 160), 304] and len(chosen) == 96


def test_split_folders(tmp_path):
    write(tmp_path / "train" / "a.jpg", 1)
    write(tmp_path / "val" / "b.jpg", 2)
    assert [build(tmp_path, split=s).names for s in ("train", "val")] == [["a.jpg"], ["b.jpg"]]


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pictures \(.jpg, .*got .*nowhere; copy any"):
        build(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="got no picture in"):
        build(tmp_path)
    with pytest.raises(ValueError, match="kind 'images' needs a folder"):
        build(None)
    write(tmp_path / "one.jpg")
    with pytest.raises(ValueError, match="'val' of 1 pictures is empty"):
        build(tmp_path, split="val")
    with pytest.raises(FileNotFoundError, match=r"camera/rgb_\*.*got no clip.*Hugging Face"):
        build(tmp_path, kind="bench2drive")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "video"}, "kind: must be one of"),
        ({"split": "test"}, "split: must be one of"),
        ({"frames": 3}, "kind 'images' takes .* got frames"),
        ({"kind": "scenes"}, "kind 'scenes' takes .* got root"),
        ({"split_file": "x"}, "got split_file"),
        ({"size": (63, 64)}, "even height"),
        ({"photometric": True}, "photometric: needs augment=True"),
        ({"val_fraction": 0.7}, r"val_fraction: must be in \(0, 0.5\]"),
    ],
)
def test_build_rejects(pictures, options, message):
    with pytest.raises(ValueError, match=message):
        build(pictures, **options)


def test_augmentation_follows_seed_epoch_and_index(pictures):
    a, b = (build(pictures, augment=True, photometric=True, seed=1) for _ in range(2))
    other = build(pictures, augment=True, photometric=True, seed=2)
    assert all(same(a[i], b[i]) for i in (5, 0, 7))
    assert not same(a[5], other[5])
    first = a[5]
    a.set_epoch(1)
    assert a.epoch == 1 and not same(a[5], first)
    a.set_epoch(0)
    assert same(a[5], first)
    plain = build(pictures)
    still = plain[5]
    plain.set_epoch(3)
    assert same(plain[5], still)
    with pytest.raises(ValueError, match="epoch must be >= 0"):
        a.set_epoch(-1)


def test_workers_see_the_epoch(pictures):
    here, there = (build(pictures, augment=True, seed=1) for _ in range(2))
    sampler = data.EpochSampler(len(there), seed=1)
    batches = loader(there, sampler, 5, 2)
    for epoch, start in ((0, 0), (1, 10)):
        there.set_epoch(epoch)
        here.set_epoch(epoch)
        sampler.set_epoch(epoch, start)
        seen = []
        for batch in batches:
            for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
                assert torch.equal(image, here[index]["image"])
                seen.append(index)
        assert seen == sampler.order()[start:].tolist()


def test_frames(drive, caplog):
    root, split = drive
    with caplog.at_level(logging.WARNING, "kdfast.data"):
        dataset = build(root, kind="bench2drive", split_file=split)
    assert dataset.views == 6 and len(dataset) == 5 * 6
    assert dataset.incomplete == ["b/00001"]
    assert "left out 1 of 6 frames" in caplog.text and "b/00001" in caplog.text
    assert dataset.frames == [("a", f"0000{i}") for i in range(3)] + [
        ("b", "00000"),
        ("b", "00002"),
    ]
    path = root / "v1" / "b" / "camera" / "rgb_back_left" / "00000.jpg"
    assert dataset[3 * 6 + 4]["path"] == str(path)
    val = build(root, kind="bench2drive", split="val", split_file=split)
    assert [clip for clip, _ in val.frames] == ["c"] * 3
    assert len(build(root, kind="bench2drive")) == 8 * 6


def test_six_views_share_the_crop(drive):
    root, split = drive
    # All six files of a frame hold the same picture, so equal items mean equal draws.
    options = {"kind": "bench2drive", "split_file": split, "augment": True}
    crop = build(root, **options)
    frames = [[crop[6 * frame + camera]["image"] for camera in range(6)] for frame in range(2)]
    assert all(torch.equal(view, frames[0][0]) for view in frames[0])
    assert not torch.equal(frames[0][0], frames[1][0])
    colour = build(root, photometric=True, **options)
    views = [colour[camera]["image"] for camera in range(6)]
    assert sum(not torch.equal(a, b) for a, b in zip(views, views[1:], strict=False)) >= 4


def test_split_file_errors(drive, tmp_path):
    root, split = drive
    make = {"kind": "bench2drive", "split": "val"}
    with pytest.raises(ValueError, match="'val' of bench2drive needs split_file"):
        build(root, **make)
    with pytest.raises(FileNotFoundError, match="split_file: must be a JSON file"):
        build(root, split_file=tmp_path / "no.json", **make)
    split.write_text("{")
    with pytest.raises(ValueError, match="split_file: must be JSON"):
        build(root, split_file=split, **make)
    split.write_text('{"train": []}')
    with pytest.raises(ValueError, match="list of clip names 'val'"):
        build(root, split_file=split, **make)
    split.write_text('{"val": ["v1/elsewhere"]}')
    with pytest.raises(ValueError, match="must hold a clip, got none of 3"):
        build(root, split_file=split, **make)


BROKEN = {
    "truncated": (lambda code: code[: len(code) // 2], "cannot be decoded"),
    "empty": (lambda code: b"", "the file is empty"),
    "text": (lambda code: b"not a picture", "cannot be decoded"),
    "gone": (None, "cannot be opened"),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("how", BROKEN)
def test_corrupt_item(tmp_path, how, suffix):
    change, reason = BROKEN[how]
    path = tmp_path / f"a.{suffix}"
    write(path, 1)
    dataset = build(tmp_path)
    if change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    item = dataset[0]
    assert isinstance(item, data.Corrupt)
    assert item.path == str(path) and item.index == 0 and reason in item.reason


def test_truncated_where_opencv_fills_the_rest(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    write(path)
    code = path.read_bytes()
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((36, 64, 3), np.uint8))
    assert not isinstance(read_bgr(path), str)
    path.write_bytes(code[:-30])
    assert "truncated" in read_bgr(path)


def test_exif_rotation_is_ignored(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_bgr(tmp_path / "a.jpg").shape == (4, 6, 3)


def test_trailing_bytes_are_not_corrupt(tmp_path):
    write(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"appended by a phone")
    assert not isinstance(build(tmp_path)[0], data.Corrupt)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_pictures_reach_the_counter(pictures, workers, caplog):
    dataset = build(pictures)
    bad = pictures / dataset.names[4]
    bad.write_bytes(b"broken")
    sampler = data.EpochSampler(len(dataset), shuffle=False)
    counter = data.CorruptCounter(len(dataset))
    sizes = []
    with caplog.at_level(logging.WARNING, "kdfast.data"):
        for _ in range(2):
            for batch in loader(dataset, sampler, 12, workers):
                counter.update(batch)
                sizes.append((len(batch["image"]), [item.path for item in batch["corrupt"]]))
    assert sizes == [(11, [str(bad)]), (12, []), (12, [])] * 2
    assert (counter.seen, counter.bad, list(counter.paths)) == (72, 2, [str(bad)])
    assert caplog.text.count(str(bad)) == 1


def test_collate():
    item = {
        "image": torch.ones(3, 2, 2),
        "index": 7,
        "path": "p",
        "label": torch.zeros(2, 2).long(),
    }
    broken = data.Corrupt(3, "q", "why")
    batch = data.collate([broken, item, item])
    assert batch["image"].shape == (2, 3, 2, 2) and batch["label"].shape == (2, 2, 2)
    assert batch["index"].tolist() == [7, 7] and batch["index"].dtype == torch.int64
    assert batch["path"] == ["p", "p"] and batch["corrupt"] == [broken]
    none = data.collate([broken])
    assert none["image"].shape == (0, 3, 0, 0) and none["index"].shape == (0,)
    assert none["corrupt"] == [broken] and none["path"] == [] and "label" not in none


def batch_of(good, *bad):
    return {"path": ["p"] * good, "corrupt": [data.Corrupt(0, path, "why") for path in bad]}


def test_counter_small_set():
    counter = data.CorruptCounter(5)
    for _ in range(3):
        counter.update(batch_of(4, "a"))  # one bad file of five, every epoch
    with pytest.raises(data.CorruptDataError, match=r"at most 1.0% .* got 5 of 20 read \(2 files"):
        counter.update(batch_of(3, "a", "b"))


def test_counter_large_set():
    counter = data.CorruptCounter(100_000)
    counter.update(batch_of(0, *(f"early{i}" for i in range(10))))  # 10 of the first 1000
    with pytest.raises(data.CorruptDataError, match="got 11 of 11 read"):
        counter.update(batch_of(0, "eleventh"))
    counter = data.CorruptCounter(100_000)
    counter.update(batch_of(4950, *(f"b{i}" for i in range(50))))  # exactly 1 %
    with pytest.raises(data.CorruptDataError):
        counter.update(batch_of(0, "over"))


def test_counter_state():
    first = data.CorruptCounter(1000)
    first.update(batch_of(900, "a", "b"))
    second = data.CorruptCounter(1000)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == {"seen": 902, "bad": 2, "paths": {"a": "why", "b": "why"}}
    with pytest.raises(ValueError, match="files: must be positive"):
        data.CorruptCounter(0)


def test_sampler_is_a_permutation_of_seed_and_epoch():
    sampler = data.EpochSampler(50, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(50)) and first != list(range(50))
    assert list(data.EpochSampler(50, seed=3)) == first
    assert list(data.EpochSampler(50, seed=4)) != first
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(50)) and list(sampler) != first
    assert list(data.EpochSampler(4, shuffle=False)) == [0, 1, 2, 3]


@pytest.mark.parametrize("group", [1, 6])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sampler_ranks(world, even, group):
    length = 17 * group
    ranks = [
        data.EpochSampler(length, seed=1, rank=r, world=world, group=group, even=even)
        for r in range(world)
    ]
    orders = [list(sampler) for sampler in ranks]
    assert [len(sampler) for sampler in ranks] == [len(order) for order in orders]
    every = sum(orders, [])
    assert len(set(every)) == len(every)
    if even:
        assert {len(order) for order in orders} == {17 // world * group}
    else:
        assert sorted(every) == list(range(length))
    for order in orders:
        for at in range(0, len(order), group):
            assert order[at : at + group] == list(range(order[at], order[at] + group))
            assert order[at] % group == 0


@pytest.mark.parametrize("group", [1, 6])
def test_sampler_resumes(group):
    whole = [list(data.EpochSampler(120, seed=2, epoch=5, rank=r, world=2, group=group))
             for r in (0, 1)]  # fmt: skip
    start = 4 * group * 2
    for rank in (0, 1):
        rest = data.EpochSampler(120, seed=2, epoch=5, start=start, rank=rank, world=2, group=group)
        assert list(rest) == whole[rank][start // 2 :] and len(rest) == len(list(rest))
    # The same prefix was consumed, whatever the number of ranks.
    done = {index for order in whole for index in order[: start // 2]}
    alone = data.EpochSampler(120, seed=2, epoch=5, start=start, group=group)
    assert set(alone) == set(range(120)) - done
    alone.set_epoch(6)
    assert len(alone) == 120
    assert list(data.EpochSampler(120, start=120)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be a positive multiple"),
        ({"group": 6}, "length 50, group 6"),
        ({"rank": 2, "world": 2}, "0 <= rank < world"),
        ({"world": 51, "rank": 0}, "51 ranks need 51 groups"),
        ({"start": 51}, r"start must be .* got 51"),
        ({"start": 3, "world": 2}, "multiple of world 2"),
        ({"epoch": -1}, "epoch must be >= 0"),
    ],
)
def test_sampler_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        data.EpochSampler(**{"length": 50, **options})


def test_real_frames(shared, tmp_path):
    archive = shared / "carla_frames.tar"
    if not archive.is_file():
        pytest.skip(f"no {archive.name} in the shared data")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".jpg")][::40]
        tar.extractall(tmp_path, members, filter="data")
    dataset = build(tmp_path, size=(640, 640), augment=True, val_fraction=0.25)
    batch = data.collate([dataset[i] for i in range(4)])
    assert batch["corrupt"] == [] and batch["image"].shape == (4, 3, 640, 640)
    # Natural pictures are roughly centred by the ImageNet statistics.
    assert batch["image"].mean().abs() < 1.2 and 0.3 < batch["image"].std() < 1.6
