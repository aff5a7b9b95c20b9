# SPDX-License-Identifier: Apache-2.0
"""Work that several gloo processes share by turns."""

import os
import signal

import pytest

from kdfast.machine.ranks import Ranks
from kdfast.machine.signals import Interrupted, Signals
from kdfast.machine.turns import in_turns, share_of
from kdfast.testing.ranks import in_ranks


def square(item, number):
    assert item == number
    return item * item


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("total", [0, 1, 2, 6, 7])
def test_results_come_in_the_order_of_one_process(world, total):
    def work(rank):
        ranks = Ranks.here()
        mine = range(rank, total, world)
        assert len(mine) == share_of(total, ranks)
        assert list(in_turns(ranks, mine, square)) == [i * i for i in range(total)]
        for limit in (0, 1, 5):
            few = list(in_turns(ranks, mine, square, limit=limit))
            assert few == [i * i for i in range(min(limit, total))]

    assert in_ranks(world, work) == [""] * world


def test_shares_may_be_of_any_size():
    def work(rank):
        mine = ["abc", "", "de"][rank]
        found = list(in_turns(Ranks.here(), mine, lambda item, number: (item, number)))
        assert found == [("a", 0), ("d", 2), ("b", 3), ("e", 5), ("c", 6)]

    assert in_ranks(3, work) == [""] * 3


def test_the_first_item_is_done_before_all_others(tmp_path):
    def work(rank):
        log = tmp_path / "log"

        def note(item, number):
            with log.open("a") as file:
                print(item, file=file)

        def lead():
            assert log.read_text() == "0\n"
            Ranks.here().shared(lambda: None)  # all have read it

        list(in_turns(Ranks.here(), range(rank, 5, 2), note, lead=lead))

    assert in_ranks(2, work) == ["", ""]
    assert sorted((tmp_path / "log").read_text().split()) == list("01234")


@pytest.mark.parametrize("where", ["iter", "next", "work"])
def test_an_error_of_one_ends_all(where):
    class Items:
        def __iter__(self):
            if where == "iter":
                raise OSError("no worker")
            yield 2
            raise OSError("no worker")

    def work(rank):
        def fails(item, number):
            if rank == 2 and where == "work":
                raise OSError("no worker")

        list(in_turns(Ranks.here(), Items() if rank == 2 else range(5), fails))

    found = in_ranks(3, work)
    assert found[2] == "OSError: no worker"
    assert all("PeerError: process 2 of 3 failed: OSError: no worker" in x for x in found[:2])


def test_a_signal_to_one_ends_all():
    def work(rank):
        def stop(item, number):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        with Signals():
            list(in_turns(Ranks.here(), range(rank, 9, 2), stop))

    assert all("Interrupted: stopped by SIGTERM" in text for text in in_ranks(2, work))


def test_a_signal_that_was_noted_ends_one_process():
    done = []
    with Signals() as signals, signals.noting(), pytest.raises(Interrupted):
        for item in in_turns(Ranks(), range(9), square):
            done.append(item)
            os.kill(os.getpid(), signal.SIGTERM)
    assert done == [0]
