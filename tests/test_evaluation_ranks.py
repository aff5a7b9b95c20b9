# SPDX-License-Identifier: Apache-2.0
"""Evaluation by several gloo processes, against that of one."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.chain.evaluate import ClassEvaluator
from kdfast.configs import load
from kdfast.data.dealt import DealtSampler
from kdfast.data.orion.clips import ClipSampler
from kdfast.data.orion.prepare import new_sample
from kdfast.data.orion.sample import SampleOptions
from kdfast.data.views.base import Corrupt, ViewDataset
from kdfast.distillation.evaluate import Evaluator as DistilEvaluator
from kdfast.models.orion import OrionHeads
from kdfast.recovery.compensation import CalibrationViews
from kdfast.recovery.data import view_feed
from kdfast.recovery.evaluate import Evaluator
from kdfast.recovery.orion.evaluate import FrameEvaluator
from kdfast.recovery.orion.feed import OrionFrames, frame_feed
from kdfast.recovery.orion.teacher import heads_config
from kdfast.testing.models import small_eva
from kdfast.testing.ranks import in_ranks
from kdfast.trainer.class_feed import class_feed

CPU = torch.device("cpu")
ALONE = SimpleNamespace(autocast=nullcontext, device=CPU)
CLASSES = 3
# Uneven shares, and with 5 processes empty ones.
WORLDS = [2, 3, 5]


def same(world, measure, tmp_path):
    """Whether ``measure(rank, world)`` gives in each of several processes what it gives in one."""
    torch.save(want := measure(0, 1), tmp_path / "one.pt")

    def work(rank):
        found = measure(rank, world)
        assert repr(found) == repr(want), (found, want)

    assert in_ranks(world, work) == [""] * world
    return want


@pytest.mark.parametrize(
    ("length", "batch", "group"), [(1, 4, 1), (11, 4, 1), (12, 5, 3), (8, 2, 2)]
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_those_of_one_process(length, batch, group, shuffle):
    def batches(rank=0, world=1):
        options = {"seed": 3, "group": group, "shuffle": shuffle, "rank": rank, "world": world}
        sampler = DealtSampler(length, batch, **options)
        order = list(sampler)
        assert len(order) == len(sampler)
        return [order[at : at + batch] for at in range(0, len(order), batch)]

    whole = batches()
    assert sorted(i for some in whole for i in some) == list(range(length))
    for world in WORLDS:
        for rank in range(world):
            assert batches(rank, world) == whole[rank::world]


def test_a_position_in_batches_that_are_dealt_is_an_error():
    sampler = DealtSampler(8, 2)
    sampler.set_epoch(0, 2)
    with pytest.raises(ValueError, match="must be read from 0 on, got 2"):
        iter(sampler)
    with pytest.raises(ValueError, match="batch must be positive, got 0"):
        DealtSampler(8, 0)


class Labelled:
    """Pictures with targets."""

    def __len__(self):
        return 11

    def set_epoch(self, epoch):
        pass

    def __getitem__(self, index):
        image = np.random.default_rng(index).random((3, 8, 8), np.float32)
        return {
            "image": torch.from_numpy(image),
            "target": torch.tensor(index % CLASSES),
            "index": index,
            "variant": 0,
        }


class Net(nn.Module):
    """Its features depend on the others of the batch, and on the statistics of a batch norm."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))
        self.last = nn.Linear(8, CLASSES)

    def forward(self, images):
        return self.last(self.body(images - images.mean(0)).mean((2, 3)))


def trained(rank):
    """A net whose statistics are other ones in every process but the first."""
    net = Net()
    net.body[1].running_mean += rank
    return net


def shared(rank, world):
    return class_feed(Labelled(), batch_size=3, device=CPU, rank=rank, world=world, train=False)


@pytest.mark.parametrize("world", WORLDS)
def test_a_link_is_measured_alike(tmp_path, world):
    def measure(rank, world):
        evaluate = ClassEvaluator(ALONE, "multiclass", CLASSES)
        meter = evaluate(trained(rank), shared(rank, world))
        seen = {name: part.tolist() for name, part in meter.gathered().items()}
        return meter.count, meter.compute(), seen

    count, values, _ = same(world, measure, tmp_path)
    assert count == 11 and not math.isnan(values["auc"])


@pytest.mark.parametrize("world", WORLDS)
def test_a_distilled_model_is_measured_alike(tmp_path, world):
    def measure(rank, world):
        evaluate = DistilEvaluator(
            ALONE, shared(rank, world), Net(1), comparable=True, logits=True, labels=True
        )
        model = trained(rank)
        return evaluate(model), evaluate(model), evaluate(evaluate.teacher)

    found, again, _ = same(world, measure, tmp_path)
    assert found == again and set(found) == {"cosine", "agreement", "accuracy"}


class Frames(ViewDataset):
    """Two views a frame, with labels or without; a file may be damaged."""

    def __init__(self, count, *, labels=False, damaged=()):
        super().__init__(split="val", size=(8, 8), augment=False, seed=0)
        self.views, self.count, self.damaged = 2, count, damaged
        self.classes = ("a", "b", "c") if labels else ()

    def __len__(self):
        return self.count

    def load(self, index):
        if index in self.damaged:
            return Corrupt(index, f"{index}.png", "cut off")
        numbers = np.random.default_rng(index)
        image = torch.from_numpy(numbers.random((3, 8, 8), np.float32))
        item = {"image": image, "index": index, "path": f"{index}.png"}
        if self.classes:
            item["label"] = torch.from_numpy(numbers.integers(0, 3, (8, 8)))
        return item


class Dense(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, CLASSES, 1)

    def forward(self, images):
        return self.conv(images - images.mean(0))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 5])
def test_a_backbone_is_measured_alike(tmp_path, world, labels, limit):
    def measure(rank, world):
        dataset = Frames(14, labels=labels, damaged=(3,))
        feed = view_feed(dataset, batch_size=2, device=CPU, rank=rank, world=world, train=False)
        head, teacher = (nn.Identity(), None) if labels else (None, Dense(1))
        return Evaluator(ALONE, feed, head, teacher, limit)(Dense(0))

    assert -1 < same(world, measure, tmp_path) < 1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [1, 7, 14, 99])
def test_calibration_views_are_those_of_one_process(world, count):
    def views(rank, world):
        feed = view_feed(Frames(14), batch_size=3, device=CPU, rank=rank, world=world, train=False)
        found = CalibrationViews(feed, count)
        assert len(list(found)) == len(list(found))
        return [batch["image"] for batch in found]

    whole = views(0, 1)
    assert len(whole) == math.ceil(min(count, 14) / 3)
    for rank in range(world):
        mine = views(rank, world)
        assert len(mine) == len(whole[rank::world])
        assert all(torch.equal(a, b) for a, b in zip(mine, whole[rank::world], strict=True))


def test_too_many_damaged_pictures_of_one_process_end_all():
    def work(rank):
        feed = view_feed(
            Frames(14, damaged=range(0, 14, 2)), batch_size=2, device=CPU, rank=rank, world=2,
            train=False,
        )  # fmt: skip
        Evaluator(ALONE, feed, None, Dense(1), None)(Dense(0))

    found = in_ranks(2, work)
    assert all(
        "CorruptDataError: pictures: at most 1.0% may be unreadable" in text for text in found
    )


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Three clips of other lengths."""
    root = tmp_path_factory.mktemp("b2d") / "data"
    new_sample(root, SampleOptions(clips=4, val_clips=3, frames=4, size=(64, 96)))
    return root


def test_clips_are_shared(frames):
    infos = OrionFrames(frames, split="val", size=(64, 64), seed=0).infos
    whole = list(ClipSampler(infos))
    assert whole == list(range(len(infos))) and len(infos.clips) == 3
    for world in (2, 3, 5):
        samplers = [ClipSampler(infos, rank=rank, world=world) for rank in range(world)]
        shares = [list(sampler) for sampler in samplers]
        assert sorted(frame for share in shares for frame in share) == whole
        assert [len(sampler) for sampler in samplers] == list(map(len, shares))
        # Whole clips: a frame and the one after it are in the same share.
        starts = {infos.span(clip)[0] for clip in range(3)}
        of = {frame: rank for rank, share in enumerate(shares) for frame in share}
        assert all(of[frame] == of[frame - 1] for frame in whole if frame not in starts)
    assert list(ClipSampler(infos, stride=3)) == [
        frame for clip in range(3) for frame in range(*infos.span(clip), 3)
    ]
    with pytest.raises(ValueError, match="stride must be positive, got 0"):
        ClipSampler(infos, stride=0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("limit", [None, 30])
def test_frames_are_measured_alike(frames, tmp_path, world, limit):
    config = load("orion50_mini", [f"data.root={frames}", "data.size=[64, 64]"])
    backbone = small_eva(img_size=64, patch_size=16)
    sizes = SimpleNamespace(dim=16, layers=1, ffn=16, queries=6, lanes=4, dn_groups=1)
    torch.manual_seed(2)
    heads = OrionHeads(heads_config(sizes, 48, 16))

    def measure(rank, world):
        dataset = OrionFrames(frames, split="val", size=(64, 64), seed=0)
        feed = frame_feed(config, dataset, None, CPU, rank=rank, world=world)
        evaluate = FrameEvaluator(ALONE, feed, heads, limit)
        found = [
            [array.tolist() for part in row for array in vars(part).values() if array is not None]
            for row in evaluate.rows(backbone)
        ]
        return len(found), found, evaluate.scores(backbone)

    count, _, scores = same(world, measure, tmp_path)
    assert count == scores.frames == (12 if limit is None else 5)
