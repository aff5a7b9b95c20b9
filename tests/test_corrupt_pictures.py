# SPDX-License-Identifier: Apache-2.0
"""Labelled pictures that cannot be read: another stands in, they are counted, many stop a run."""

import logging

import cv2
import numpy as np
import pytest
import torch

from kdfast.chain.teacher_cache import TeacherCache
from kdfast.data import CorruptDataError
from kdfast.data.corrupt import CorruptCounter
from kdfast.data.labelled import build_classification
from kdfast.trainer.class_feed import class_feed


@pytest.fixture
def root(tmp_path):
    """Two classes of 160 pictures in three splits."""
    for split, count in (("train", 120), ("val", 20), ("test", 20)):
        for n in range(count):
            path = tmp_path / split / "ab"[n % 2] / f"{n:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = np.random.default_rng(n).integers(0, 256, (20, 20, 3), np.uint8)
            path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return tmp_path


def damage(root, *numbers):
    for number in numbers:
        (root / "train" / "ab"[number % 2] / f"{number:03d}.png").write_bytes(b"no picture")


def load(root, memory=1.0):
    return build_classification(
        "imagefolder", root, size=16, seed=0, augment="none", memory=memory
    ).train


@pytest.mark.parametrize("memory", [0, 1])
def test_another_picture_stands_in(root, memory, caplog):
    whole = load(root)
    damage(root, 0)
    with caplog.at_level(logging.WARNING, "kdfast.data"):
        data = load(root, memory)
    if memory:
        assert "1 of 120 pictures cannot be read: train/a/000.png: cannot be" in caplog.text
    item = data[0]
    assert item["corrupt"][0] == "train/a/000.png" and "cannot be decoded" in item["corrupt"][1]
    other = item["index"]
    assert other != 0 and item["target"] == whole.targets[other]
    assert torch.equal(item["image"], whole[other]["image"])
    assert all(torch.equal(data[n]["image"], whole[n]["image"]) for n in range(1, len(data)))
    assert data[1]["corrupt"] == ("", "")


def test_many_stop_the_run(root):
    lazy = load(root, 0)
    damage(root, *range(120))
    with pytest.raises(CorruptDataError, match="at least one of 33 must be readable to stand in"):
        lazy[0]
    with pytest.raises(CorruptDataError, match=r"got 2 of 2 read \(2 files, first train/a/000"):
        load(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_feed_names_and_counts_them(root, caplog, workers):
    damage(root, 4)
    data = load(root, 0)
    feed = class_feed(data, batch_size=8, device=torch.device("cpu"), workers=workers)
    with caplog.at_level(logging.WARNING, "kdfast.data"):
        seen = [batch.index for batch in feed.batches(0)]
    state = feed.state_dict()
    assert (state["seen"], state["bad"]) == (120, 1) and list(state["paths"]) == ["train/a/004.png"]
    assert caplog.text.count("skipped train/a/004.png: cannot be decoded") == 1
    # Sorted by class: the third of class a.
    assert 2 not in sum(seen, []) and sum(map(len, seen)) == 120
    feed.close()
    damage(root, 10)
    feed = class_feed(load(root, 0), batch_size=8, device=torch.device("cpu"), workers=workers)
    with pytest.raises(CorruptDataError, match="at most 1.0% may be unreadable, got 2 of"):
        list(feed.batches(0))
    feed.close()


def test_a_file_that_cannot_be_opened_stops_at_once(root):
    data = load(root, 0)
    (root / "train" / "a" / "000.png").unlink()
    with pytest.raises(FileNotFoundError, match="000.png"):
        data[0]


def test_a_checkpoint_of_a_run_that_did_not_count():
    counter = CorruptCounter(10)
    counter.add(3, [])
    counter.load_state_dict({})
    assert counter.seen == 3


def test_a_teacher_cache_holds_the_logits_of_the_stand_in(root, tmp_path):
    damage(root, 4)
    data = load(root, 0)
    cache = TeacherCache.build(
        lambda images: images.mean((2, 3)), data, tmp_path / "kept", key={}, dtype="float32"
    )
    for n in (1, 2, 3):
        item = data[n]
        kept = cache.logits([item["index"]], item["variant"])[0]
        torch.testing.assert_close(kept, item["image"].mean((1, 2)))
