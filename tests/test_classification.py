# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import DataLoader

from kdfast.data.labelled import build_classification, worker_init
from kdfast.data.labelled.augment import AugmentSpec, augmented, finish, short_side
from kdfast.data.rng import _GOLDEN, AUGMENT, _mix, uniforms


def digits(**options):
    return build_classification("digits", **{"size": 16, "seed": 0, **options})


@pytest.fixture(scope="module")
def varied():
    return digits(variants=3)


def test_digits_are_three_disjoint_splits_of_real_pictures():
    data = digits()
    assert (data.name, data.task) == ("digits", "multiclass")
    assert data.class_names == [str(digit) for digit in range(10)]
    assert (len(data.train), len(data.val), len(data.test)) == (1259, 179, 359)
    item = data.val[0]
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32
    assert item["target"].dtype == torch.int64 and item["target"].shape == ()
    assert 0 <= item["image"].min() and 0.9 < item["image"].max() <= 1
    seen = [
        tuple(d.store[i].flatten().tolist())
        for d in (data.train, data.val, data.test)
        for i in range(len(d))
    ]
    # 1,797 different pictures: nothing is in two splits.
    assert len(set(seen)) == 1797


def test_split_keeps_class_shares_and_follows_the_seed():
    one, same, other = digits(), digits(), digits(seed=1)
    assert torch.equal(one.val.targets, same.val.targets)
    assert not torch.equal(one.val.store._buffer, other.val.store._buffer)
    counts = one.val.targets.bincount(minlength=10)
    assert counts.min() == 17 and counts.max() == 18


def test_items_do_not_touch_or_read_global_random_state(varied):
    first = varied.train[5, 1]["image"]
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = varied.train[5, 1]["image"]
    assert torch.equal(first, again)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_variants_differ_and_come_in_turn(varied):
    images = [varied.train[3, variant]["image"] for variant in range(3)]
    assert not any(torch.equal(images[a], images[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    for epoch in range(7):
        varied.train.set_epoch(epoch)
        item = varied.train[3]
        assert item["variant"] == epoch % 3
        assert torch.equal(item["image"], images[epoch % 3])
    varied.train.set_epoch(0)


def batches(data, workers, context=None, persistent=False):
    return DataLoader(
        data,
        batch_size=50,
        num_workers=workers,
        worker_init_fn=worker_init,
        multiprocessing_context=context,
        persistent_workers=persistent,
    )


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_items_do_not_depend_on_workers(varied, context, workers):
    data = torch.utils.data.Subset(varied.train, range(150))
    plain = [batch["image"] for batch in batches(data, 0)]
    worked = [batch["image"] for batch in batches(data, workers, context)]
    assert torch.equal(torch.cat(plain), torch.cat(worked))


def test_persistent_workers_follow_the_epoch(varied):
    loader = batches(varied.train, 1, "fork", persistent=True)
    for epoch in (1, 2, 4):
        varied.train.set_epoch(epoch)
        seen = torch.cat([batch["variant"] for batch in loader])
        assert seen.unique().tolist() == [epoch % 3] and len(seen) == len(varied.train)
    # An epoch that is left early has prefetched items of its own, which nobody gets.
    varied.train.set_epoch(0)
    assert next(iter(loader))["variant"].unique().tolist() == [0]
    varied.train.set_epoch(2)
    assert all(batch["variant"].eq(2).all() for batch in loader)
    varied.train.set_epoch(0)


def test_pairs_name_a_variant_of_their_own(varied):
    sampler = [(4, 2), (1, 0), (4, 1)]
    batch = next(iter(DataLoader(varied.train, sampler=sampler, batch_size=3)))
    assert batch["index"].tolist() == [4, 1, 4] and batch["variant"].tolist() == [2, 0, 1]
    assert torch.equal(batch["image"][1], varied.train[1, 0]["image"])
    for pair, text in (
        ((1259, 0), r"index: must be in \[0, 1259\), got 1259"),
        ((0, 3), r"variant: must be in \[0, 3\), got 3"),
        (-1, r"index: must be in \[0, 1259\), got -1"),
    ):
        with pytest.raises(IndexError, match=text):
            varied.train[pair]
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        varied.train.set_epoch(-1)


def test_evaluation_has_one_variant_whatever_the_epoch(varied):
    image = varied.val[3]["image"]
    varied.val.set_epoch(5)
    item = varied.val[3]
    assert item["variant"] == 0 and torch.equal(item["image"], image)


def grey(height, width):
    """Every pixel tells where it is: row * 16 + column."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (rows * 16 + columns).to(torch.uint8)[None]


def as_bytes(view):
    assert view.dtype == torch.float32 and view.shape[0] == 3
    return (view * 255).round().to(torch.uint8)


def still(**options):
    quiet = {"flip": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    return AugmentSpec(**quiet | options)


def views(image, size, spec, count=400):
    index, variant = np.arange(count), np.zeros(count, np.int64)
    return augmented([image] * count, size, spec, seed=0, index=index, variant=variant)


def test_padded_crop_takes_every_place_of_the_padded_picture():
    padded = torch.nn.functional.pad(grey(16, 16), (2, 2, 2, 2))
    places = {
        (y, x): padded[:, y : y + 16, x : x + 16].expand(3, 16, 16)
        for y in range(5)
        for x in range(5)
    }
    seen = []
    for view in views(grey(16, 16), 16, still(crop="pad")):
        seen += [place for place, want in places.items() if torch.equal(as_bytes(view), want)]
    assert len(seen) == 400
    counts = torch.tensor([seen.count(place) for place in places])
    # 400 draws of 25 places: 16 each, standard deviation 4.
    assert counts.min() >= 3 and counts.max() <= 32


def test_resized_crop_takes_every_place_of_a_wide_picture():
    seen = {
        (int(view[0, 0, 0] * 255) // 16, int(view[0, 0, 0] * 255) % 16)
        for view in views(grey(9, 12), 8, still(crop="resize"))
    }
    assert seen == {(y, x) for y in (0, 1) for x in range(5)}


def test_flip_is_as_probable_as_asked():
    image = grey(8, 8)
    for probability, low, high in ((0.0, 0, 0), (0.25, 60, 140), (1.0, 400, 400)):
        found = sum(
            torch.equal(as_bytes(view), image.flip(-1).expand(3, 8, 8))
            for view in views(image, 8, still(crop="none", flip=probability))
        )
        assert low <= found <= high


def test_jitter_is_torchvisions_with_factors_of_the_whole_range():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    plain = image / 255
    for name in ("brightness", "contrast", "saturation"):
        adjust = getattr(torchvision.transforms.functional, f"adjust_{name}")
        ends = [adjust(plain, 0.8), adjust(plain, 1.2)]
        width = (ends[1] - ends[0]).abs().max()
        spec = still(crop="none", **{name: 0.2})
        got = list(views(image, 8, spec, 200))
        for end in ends:
            assert min((view - end).abs().max() for view in got) < 0.1 * width
        assert all(0 <= view.min() and view.max() <= 1 for view in got)
        if name == "brightness":
            mean = torch.stack([v.mean() for v in got]).mean() / plain.mean()
            assert mean == pytest.approx(1, abs=0.03)


def test_sizes_of_small_pictures_are_kept_and_large_ones_follow_256_for_224():
    sides = {size: short_side("auto", size) for size in (28, 32, 64, 65, 96, 224)}
    assert sides == {28: 28, 32: 32, 64: 64, 65: 74, 96: 110, 224: 256}
    assert short_side("none", 224) == 256 and short_side("none", 32) == 32
    assert short_side("resize", 28) == 32 and short_side("pad", 224) == 224
    data = digits(size=224, memory=0)
    assert data.val.store[0].shape == (1, 256, 256)
    assert data.train[0]["image"].shape == (3, 224, 224)


def test_evaluation_picture_is_the_middle_of_the_resized_one():
    assert torch.equal(
        as_bytes(finish([grey(8, 12)], 8)[0]), grey(8, 12)[..., 2:10].expand(3, 8, 8)
    )
    colour = torch.randint(0, 256, (3, 10, 10), dtype=torch.uint8)
    assert torch.equal(as_bytes(finish([colour], 8)[0]), colour[:, 1:9, 1:9])
    torch.testing.assert_close(finish([colour], 8)[0], colour[:, 1:9, 1:9] / 255)


def test_default_augmentation_mirrors_no_digits():
    assert digits().facts["augmentation"]["flip"] == 0.0
    assert digits(augment=AugmentSpec()).facts["augmentation"]["flip"] == 0.5
    plain = digits(augment="none")
    assert plain.facts["augmentation"] == "none" and plain.train.variants == 1
    assert torch.equal(plain.train[3]["image"], finish([plain.train.store[3]], 16)[0])


def test_worker_init_gives_each_worker_its_own_seeds():
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        worker_init(0)
        drawn.append((random.random(), float(np.random.rand())))
    assert drawn[0] == drawn[2] != drawn[1]
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


@pytest.mark.parametrize("size", [32, 224])
def test_an_item_is_the_same_alone_in_any_batch_and_for_any_threads(size):
    data = digits(size=size, variants=2, augment=AugmentSpec(), memory=0).train
    places = [(index, index % 2) for index in range(24)]
    batch = torch.stack([item["image"] for item in data.__getitems__(places)])
    assert batch.shape == (24, 3, size, size) and batch.dtype == torch.float32
    turned = data.__getitems__(places[::-1])[::-1]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for place, image, other in zip(places, batch, turned, strict=True):
            assert torch.equal(data[place]["image"], image)
            assert torch.equal(other["image"], image)


def test_jitter_in_all_orders_against_torchvision():
    functional = torchvision.transforms.functional
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    spec = AugmentSpec(crop="none", flip=0.0)
    index, variant = np.arange(200), np.zeros(200, np.int64)
    draws = uniforms(AUGMENT, 0, np.stack([index, variant], axis=1), 9)
    orders = draws[:, 6:].argsort(axis=1)
    got = augmented([image] * 200, 8, spec, seed=0, index=index, variant=variant)
    for row in range(200):
        want = image / 255
        for step in orders[row]:
            name = ("brightness", "contrast", "saturation")[step]
            factor = 1 + 0.2 * (2 * draws[row, 3 + step] - 1)
            want = getattr(functional, f"adjust_{name}")(want, factor)
        torch.testing.assert_close(got[row], want, rtol=0, atol=2e-6)
    assert len({tuple(order) for order in orders.tolist()}) == 6


def test_uniforms_are_splitmix64_spread_and_named_by_all_their_arguments():
    # The published sequence of seed 0.
    sequence = _mix(_GOLDEN * np.arange(1, 4, dtype=np.uint64)).tolist()
    assert sequence == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    numbers = uniforms(1, 7, np.stack([np.arange(4000), np.zeros(4000, np.int64)], axis=1), 4)
    assert numbers.shape == (4000, 4) and numbers.min() >= 0 and numbers.max() < 1
    counts = np.stack([np.histogram(column, 10, (0, 1))[0] for column in numbers.T])
    # 400 in each tenth, standard deviation 19.
    assert counts.min() > 310 and counts.max() < 490
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.08
    neighbours = np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]
    assert abs(neighbours) < 0.08
    one = uniforms(1, 7, np.array([[3, 5]]), 4)
    for other in ((2, 7, [[3, 5]]), (1, 8, [[3, 5]]), (1, 7, [[5, 3]]), (1, 7, [[3, 6]])):
        assert not (uniforms(*other[:2], np.array(other[2]), 4) == one).any()
    with pytest.raises(ValueError, match="seed: must hold 0 <= seed < 2..64, got -1"):
        uniforms(1, -1, np.array([[0]]), 1)
