# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kdfast.data.classification import build_classification, worker_init


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


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_items_do_not_depend_on_workers(varied, context):
    data = torch.utils.data.Subset(varied.train, range(150))
    plain = [batch["image"] for batch in batches(data, 0)]
    worked = [batch["image"] for batch in batches(data, 2, context)]
    assert torch.equal(torch.cat(plain), torch.cat(worked))


def test_persistent_workers_follow_the_epoch(varied):
    loader = batches(varied.train, 1, "fork", persistent=True)
    for epoch in (1, 2, 4):
        varied.train.set_epoch(epoch)
        seen = torch.cat([batch["variant"] for batch in loader])
        assert seen.unique().tolist() == [epoch % 3] and len(seen) == len(varied.train)
    varied.train.set_epoch(0)
