# SPDX-License-Identifier: Apache-2.0
"""A teacher cache that several gloo processes fill, against the one of one process."""

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from kdfast.chain.cache_files import Writer
from kdfast.chain.cache_rows import Layout
from kdfast.chain.cache_shards import Shard
from kdfast.chain.teacher_cache import TeacherCache
from kdfast.machine.ranks import Ranks
from kdfast.machine.signals import Signals
from kdfast.testing.ranks import in_ranks

KEY = {"teacher": "net"}
LENGTH, VARIANTS, BATCH = 23, 3, 4
BATCHES = -(-LENGTH * VARIANTS // BATCH)


class Pictures(Dataset):
    variants = VARIANTS

    def __len__(self):
        return LENGTH

    def __getitem__(self, place):
        index, variant = place
        values = np.random.default_rng(100 * variant + index).random((3, 8, 8))
        values[0, 0, 0] = variant * LENGTH + index
        return {"image": torch.from_numpy(values).float()}


class Net(nn.Module):
    """Sums over the batch, so that a row depends on the others of its batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 11))

    def forward(self, images):
        return self.body(images - images.mean(0))


class Teacher:
    """Counts its batches in files, one for each process; may do something before one of them."""

    def __init__(self, folder, rank=0, at=None, act=None):
        self.folder, self.rank, self.at, self.act = folder, rank, at, act
        self.net, self.calls = Net().eval(), 0
        folder.mkdir(exist_ok=True)

    def __call__(self, images):
        if self.calls == self.at:
            self.act()
        self.calls += 1
        with (self.folder / f"{self.rank}").open("a") as file:
            print(int(images[0, 0, 0, 0]), file=file, flush=True)
        return self.net(images)


def batches(folder):
    """The first place of every batch that was computed, with repeats."""
    return sorted(int(x) for path in folder.iterdir() for x in path.read_text().split())


def build(directory, teacher, ranks=None, **options):
    given = {"key": KEY, "top_k": 5, "batch_size": BATCH} | options
    return TeacherCache.build(teacher, Pictures(), directory, ranks=ranks, **given)


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes: sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    build(folder / "c", Teacher(folder / "calls"))
    assert batches(folder / "calls") == list(range(0, LENGTH * VARIANTS, BATCH))
    return files(folder / "c")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Every row is on the disk at once, and nobody waits long for a folder."""
    for module in ("cache_files", "cache_shards"):
        monkeypatch.setattr(f"kdfast.chain.{module}.FLUSH", 0.0)
    monkeypatch.setattr("kdfast.chain.cache_shards.SEEN", 0.3)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_fill_the_cache_of_one(tmp_path, whole, world):
    def work(rank):
        seen = []
        teacher = Teacher(tmp_path / "calls", rank)
        cache = build(tmp_path / "c", teacher, Ranks.here(), progress=lambda *at: seen.append(at))
        assert seen[-1] == (LENGTH * VARIANTS,) * 2
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert teacher.calls in (BATCHES // world, BATCHES // world + 1)
        cache.verify(Ranks.here())
        assert cache.logits(range(LENGTH), 1).shape == (LENGTH, 11)

    assert in_ranks(world, work) == [""] * world
    assert files(tmp_path / "c") == whole
    assert batches(tmp_path / "calls") == list(range(0, LENGTH * VARIANTS, BATCH))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "calls"]


def test_more_processes_than_batches(tmp_path):
    class Few(Pictures):
        variants = 1

        def __len__(self):
            return 3

    def work(rank):
        TeacherCache.build(Net(), Few(), tmp_path / "c", key=KEY, batch_size=2, ranks=Ranks.here())

    assert in_ranks(3, work) == [""] * 3
    TeacherCache.build(Net(), Few(), tmp_path / "d", key=KEY, batch_size=2)
    assert files(tmp_path / "c") == files(tmp_path / "d")


def test_an_error_of_one_ends_all(tmp_path, whole):
    def fails():
        raise ValueError("no such picture")

    def work(rank):
        build(
            tmp_path / "c", Teacher(tmp_path / "a", rank, 2 if rank else None, fails), Ranks.here()
        )

    found = in_ranks(2, work)
    assert found[1] == "ValueError: no such picture"
    assert "PeerError: process 1 of 2 failed: ValueError: no such picture (on " in found[0]
    # The others stopped with it, and nothing of what was done is done again.
    assert len(batches(tmp_path / "a")) == 5
    build(tmp_path / "c", Teacher(tmp_path / "b"))
    assert len(batches(tmp_path / "b")) == BATCHES - 5
    assert files(tmp_path / "c") == whole


@pytest.mark.parametrize(("world", "dies", "then"), [(2, 1, 3), (3, 0, 2), (2, 0, 1)])
def test_a_killed_build_goes_on_with_other_processes(tmp_path, whole, world, dies, then):
    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    def work(rank):
        at = 3 if rank == dies else None
        build(tmp_path / "c", Teacher(tmp_path / "a", rank, at, killed), Ranks.here())

    found = in_ranks(world, work)
    assert found[dies] == "killed by 9" and all(found)
    assert not (tmp_path / "c").exists()
    done = len(batches(tmp_path / "a"))
    assert done >= 3 * world

    def resumed(rank):
        ranks = Ranks.here() if then > 1 else None
        build(tmp_path / "c", Teacher(tmp_path / "b", rank), ranks)

    assert in_ranks(then, resumed) == [""] * then
    # At most the batches of the last turn were not on the disk.
    assert len(batches(tmp_path / "b")) <= BATCHES - done + world
    assert files(tmp_path / "c") == whole


def test_a_signal_to_one_ends_all_in_order(tmp_path, whole):
    def work(rank):
        def stop():
            os.kill(os.getpid(), signal.SIGTERM)

        with Signals():
            build(
                tmp_path / "c",
                Teacher(tmp_path / "a", rank, 2 if rank else None, stop),
                Ranks.here(),
            )

    found = in_ranks(2, work)
    assert all("Interrupted: stopped by SIGTERM" in text for text in found), found
    assert len(batches(tmp_path / "a")) == 6
    build(tmp_path / "c", Teacher(tmp_path / "b"))
    assert len(batches(tmp_path / "b")) == BATCHES - 6
    assert files(tmp_path / "c") == whole


def left_behind(directory, rank=1):
    """A shard with the second batch, as a killed process leaves it."""
    layout = Layout("float16", 5, 4.0, LENGTH, VARIANTS)
    with pytest.raises(KeyboardInterrupt), Writer(directory, KEY, layout) as writer:
        pairs = [(index, 0) for index in range(BATCH)]
        images = torch.stack([Pictures()[pair]["image"] for pair in pairs])
        with torch.no_grad():
            writer.write(pairs, Net()(images))
        shard = Shard(directory, KEY, writer.layout, rank=rank, rows=BATCH)
        pairs = [(index, 0) for index in range(BATCH, 2 * BATCH)]
        images = torch.stack([Pictures()[pair]["image"] for pair in pairs])
        with torch.no_grad():
            shard.write(pairs, Net()(images))
        shard.close()
        raise KeyboardInterrupt
    return shard.path


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (lambda data: data, 0),
        (lambda data: data[:-3], 1),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], 1),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], 1),
        (lambda data: data[:5], 1),
        (lambda data: b"", 1),
    ],
    ids=["whole", "cut", "flipped", "of another cache", "half a head", "empty"],
)
def test_rows_of_a_shard_are_taken_over_unless_damaged(tmp_path, whole, damage, again):
    path = left_behind(tmp_path / "c")
    path.write_bytes(damage(path.read_bytes()))
    build(tmp_path / "c", Teacher(tmp_path / "calls"))
    assert len(batches(tmp_path / "calls")) == BATCHES - 2 + again
    assert files(tmp_path / "c") == whole


def test_a_shard_of_another_key_is_thrown_away(tmp_path):
    left_behind(tmp_path / "c")
    build(tmp_path / "c", Teacher(tmp_path / "calls"), key={"teacher": "another"})
    assert len(batches(tmp_path / "calls")) == BATCHES
    assert not list((tmp_path / "c").glob("shard*"))


def test_rows_that_never_reach_the_disk_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("kdfast.chain.cache_shards._whole", lambda rows, _: rows["place"] < 0)

    def work(rank):
        build(tmp_path / "c", Teacher(tmp_path / "calls", rank), Ranks.here())

    found = in_ranks(2, work)
    assert all("were damaged on their way to the disk 3 times" in text for text in found), found


@pytest.mark.parametrize("finished", [False, True])
def test_folders_that_are_not_shared_are_an_error(tmp_path, finished):
    if finished:
        build(tmp_path / "0" / "c", Teacher(tmp_path / "calls"))

    def work(rank):
        build(tmp_path / str(rank) / "c", Teacher(tmp_path / "calls", rank), Ranks.here())

    found = in_ranks(2, work)
    assert "must be in a folder that all processes share" in found[1]
    assert "PeerError: process 1 of 2 failed: ValueError: teacher cache: " in found[0]


def test_another_run_is_an_error_for_all(tmp_path):
    layout = Layout("float16", 5, 4.0, LENGTH, VARIANTS)

    def work(rank):
        build(tmp_path / "c", Teacher(tmp_path / "calls", rank), Ranks.here())

    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "c", KEY, layout):
        found = in_ranks(2, work)
        raise KeyboardInterrupt
    assert "BlockingIOError: " in found[0] and "being built by another process" in found[0]
    assert "PeerError: process 0 of 2 failed: BlockingIOError" in found[1]


def test_damage_is_seen_by_all(tmp_path):
    path = build(tmp_path / "c", Teacher(tmp_path / "calls")).directory / "values.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    def work(rank):
        build(tmp_path / "c", Teacher(tmp_path / "more", rank), Ranks.here()).verify(Ranks.here())

    found = in_ranks(2, work)
    assert all("is damaged: index 22, variant 2" in text for text in found), found


def test_full_disk_of_one_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr("kdfast.machine.disk.free_bytes", lambda _: 10)

    def work(rank):
        build(tmp_path / "c", Teacher(tmp_path / "calls", rank), Ranks.here())

    found = in_ranks(2, work)
    assert "shard-00001.rows: no space left, it needs " in found[1] and "DiskFull" in found[0]
