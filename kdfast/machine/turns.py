# SPDX-License-Identifier: Apache-2.0
"""Work that the processes of a run share, with its results in one order for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from typing import TypeVar

from kdfast.machine.ranks import Ranks
from kdfast.machine.signals import Interrupted, check, noting

S = TypeVar("S")
T = TypeVar("T")
# The result of a process's turn, if it had one, and the signal that came to it, or 0.
Answer = tuple[list[T], int]


def share_of(total: int, ranks: Ranks) -> int:
    """How many of ``total`` things, dealt out in turn, are this process's."""
    return len(range(ranks.rank, total, ranks.world))


def in_turns(
    ranks: Ranks,
    items: Iterable[S],
    work: Callable[[S, int], T],
    *,
    limit: int | None = None,
    lead: Callable[[], None] | None = None,
) -> Iterator[T]:
    """What the work on the items of all processes returned, by the numbers of the items.

    Item i of process r of w has number ``i * w + r``, as if all items had been dealt out in turn.
    So items that one process has in its order give the same results in the same order when they
    are dealt out to any number of processes. Processes may have more items than others, or none.
    All have to take every result; after each turn they tell each other how it went.

    Args:
        ranks: This process among all.
        items: Those of this process, in their order.
        work: Called with an item of this process and its number; where there are several
            processes the result is pickled, so its tensors have to be on the CPU.
        limit: Leave out the items with this number and higher ones; None: none.
        lead: Called in all of several processes once item 0 is done, before any other.

    Raises:
        PeerError: Another process failed to give an item or to work on it.
        Interrupted: A signal came, in one of several processes or noted before in one alone.
    """
    if ranks.world == 1:
        for number, item in enumerate(islice(items, limit)):
            check()
            yield work(item, number)
        return
    mine = chain.from_iterable((items,))  # asked for within the first turn: it may fail
    with noting() as signals:

        def step(number: int) -> Answer[T]:
            results = []
            if limit is None or number < limit:
                results = [work(item, number) for item in islice(mine, 1)]
            return results, signals.caught

        for turn in count():
            start = turn * ranks.world
            if limit is not None and start >= limit:
                return
            answers = _turn(ranks, start, step, lead if turn == 0 else None)
            if caught := max(caught for _, caught in answers):
                raise Interrupted(caught)
            found = [result for results, _ in answers for result in results]
            if not found:
                return
            yield from found


def _turn(
    ranks: Ranks,
    start: int,
    step: Callable[[int], Answer[T]],
    lead: Callable[[], None] | None,
) -> list[Answer[T]]:
    """One step of every process; with ``lead`` the first process goes before the others."""
    number = start + ranks.rank
    if lead is None:
        return ranks.shared(lambda: step(number))
    first = ranks.shared(lambda: step(number) if ranks.main else None)
    lead()
    others = ranks.shared(lambda: None if ranks.main else step(number))
    return [answer for answer in (first[0], *others[1:]) if answer is not None]
