# SPDX-License-Identifier: Apache-2.0
"""Evaluation by all processes, with the batches, and so the results, of one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from kdfast.machine.ranks import Ranks
from kdfast.machine.turns import in_turns, share_of
from kdfast.trainer.feed import Batch, Feed

T = TypeVar("T")


def ranks_of(feed: Feed[Any]) -> Ranks:
    """The processes that share a feed; one alone where it has all items."""
    return Ranks(feed.sampler.rank, feed.sampler.world)


def batches_of(feed: Feed[Any], items: int) -> int:
    """Batches of the whole set that hold about so many items."""
    return math.ceil(items / feed.batch_size)


def own_batches(feed: Feed[Any], items: int) -> int:
    """How many of these are this process's."""
    return share_of(batches_of(feed, items), ranks_of(feed))


def evaluated(
    feed: Feed[Any], work: Callable[[Batch, int], T], *, limit: int | None = None
) -> Iterator[T]:
    """What the work on all batches of a held-out set returned, in their order.

    All processes that share the feed get all results, each batch's from the process whose it is.

    Args:
        feed: Of a ``DealtSampler``.
        work: Called with a batch and its number in the whole set; the result is pickled where
            there are several processes, and its tensors have to be on the CPU then.
        limit: Stop after about so many items; None: all.

    Raises:
        PeerError: Another process failed.
        Interrupted: A signal came, in one of several processes or noted before in one alone.
    """
    count = None if limit is None else batches_of(feed, limit)
    return in_turns(ranks_of(feed), feed.batches(0), work, limit=count)


@torch.no_grad()
def same_buffers(ranks: Ranks, *models: nn.Module | None) -> None:
    """Gives the models of all processes the buffers of the first one.

    While parameters are kept the same in training, the statistics of a batch norm follow each
    process's own batches between two steps.
    """
    if ranks.world == 1:
        return
    for model in models:
        for buffer in () if model is None else model.buffers():
            held = buffer.contiguous()
            dist.broadcast(held, 0)
            if held is not buffer:
                buffer.copy_(held)
