# SPDX-License-Identifier: Apache-2.0
"""All steps of ``kdfast prune``, from the model to the folder."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from kdfast.pruner.checks import by_latency, check
from kdfast.pruner.choose import by_scores, cut, for_latency, scored
from kdfast.pruner.measure import measured, timed
from kdfast.pruner.output import save, show
from kdfast.pruner.sweep import sweep
from kdfast.pruner.work import Work, prepare
from kdfast.pruning.constant import DropReport, drop_blocks


def run(options: argparse.Namespace) -> None:
    """Everything that the command line asks for.

    Raises:
        UsageError: It cannot be met.
    """
    check(options)
    torch.manual_seed(options.seed)
    work = prepare(options)
    if options.sweep is not None:
        sweep(work)
    else:
        _prune(work)


def _prune(work: Work) -> None:
    options, images = work.options, work.images
    if by_latency(options):
        chosen, images = for_latency(work)
    else:
        chosen = by_scores(work, scored(work), options.keep)
    pruned, errors = cut(work, chosen)
    dropped = drop_blocks(pruned) if chosen.outcome else DropReport([], {})
    latency = timed(work, pruned, images)
    found = measured(work, chosen, pruned, latency)
    if chosen.outcome is not None:
        dense = latency.get("before, fused", latency["before"])
        outcome = replace(chosen.outcome, dense=dense, pruned=latency["pruned, fused"])
        chosen = chosen._replace(outcome=outcome)
    save(options.out, work, chosen, pruned, found, errors, dropped)
    show(work, chosen, found, errors, dropped, images)
