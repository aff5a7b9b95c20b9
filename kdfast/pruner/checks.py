# SPDX-License-Identifier: Apache-2.0
"""What is asked of a command line before any work: requests that cannot be met end here."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.by_latency import check_goal
from kdfast.pruning.folder import CONFIG
from kdfast.sources import is_place

PACKAGES = ("matplotlib", "rich")  # for the heat map and the table
# What --speedup and --latency-ms choose by themselves, and what stands for it without them.
DEFAULTS = {"keep": 0.5, "mlp_keep": None, "method": "taylor", "scope": "block"}


class UsageError(Exception):
    """The request cannot be met; the message, one line, says what the user has to change."""


@contextmanager
def asked(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into UsageError.

    Only for code that does not run the model: the model's own errors keep their traceback.
    """
    try:
        yield
    except kinds as error:
        raise UsageError(str(error)) from error


def by_latency(options: argparse.Namespace) -> bool:
    """Whether a latency was asked for."""
    return options.speedup is not None or options.latency_ms is not None


def compensates(options: argparse.Namespace) -> bool:
    """Whether removed parts are folded into kept ones: by default where there is data for it."""
    if options.compensate is None:
        return options.data is not None and not options.mean_context
    return bool(options.compensate)


def reads_pictures(options: argparse.Namespace) -> bool:
    """Whether the scores or mean contexts need pictures; times can be measured on noise."""
    if options.method == "reconstruction" and compensates(options):
        return False
    return options.method != "magnitude" or options.mean_context


def check(options: argparse.Namespace) -> None:
    """Raises UsageError for a request that no model could meet, and fills in what was left out."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"missing packages: {', '.join(missing)}; pip install 'kdfast[train]'")
    if (options.out / CONFIG).exists() and not options.overwrite:
        raise UsageError(f"--out: {options.out} holds a model already; --overwrite replaces it")
    if options.batches < 1 or options.batch_size < 1 or options.rounds < 2:
        raise UsageError("--batches and --batch-size must be at least 1, --rounds at least 2")
    if options.pictures < 0:
        raise UsageError(f"--pictures: must be at least 0, got {options.pictures}")
    _check_sweep(options)
    _check_latency(options)
    if options.compensate and options.mean_context:
        raise UsageError("--mean-context: --compensate has it, give one of them")
    if options.sequential and not compensates(options):
        raise UsageError("--sequential: needs --compensate or --data")
    if options.calibrate < 1:
        raise UsageError(f"--calibrate: must be at least 1, got {options.calibrate}")
    for name in ("keep", "mlp_keep"):
        _check_keep(name.replace("_", "-"), getattr(options, name))
    if options.data and not is_place(options.data):
        raise UsageError(f"--data: must be a folder, got {options.data}")
    _check_writable(options.out)


def _check_keep(flag: str, value: object) -> None:
    if isinstance(value, float) and not 0 < value <= 1:
        raise UsageError(f"--{flag}: with a point it is a fraction in (0, 1], got {value}")
    if isinstance(value, Path) and not value.is_file():
        raise UsageError(f"--{flag}: there is no file {value}")
    if isinstance(value, Path) and flag == "mlp-keep":
        raise UsageError("--mlp-keep: takes a number, a share or a list, a file is for --keep")


def _check_sweep(options: argparse.Namespace) -> None:
    """Raises UsageError for a list of shares that cannot be tried one after the other."""
    if options.sweep is None:
        return
    if options.keep is not None or by_latency(options):
        raise UsageError("--sweep: takes the place of --keep, --speedup and --latency-ms")
    for keep in options.sweep:
        _check_keep("sweep", keep)
    held = [str(path) for path in sweep_folders(options).values() if (path / CONFIG).exists()]
    if held and not options.overwrite:
        raise UsageError(f"--out: {', '.join(held)} holds a model already; --overwrite replaces it")


def sweep_folders(options: argparse.Namespace) -> dict[int | float, Path]:
    """Where every pruned model of --sweep goes, by its share."""
    return {keep: options.out / f"keep_{keep:g}" for keep in sorted(options.sweep)}


def _check_latency(options: argparse.Namespace) -> None:
    """Raises UsageError for a goal in time that is none, and fills in what is not chosen by one."""
    if not by_latency(options):
        # Heads that are given need no score but for the picture.
        if isinstance(options.keep, Path) and options.method is None:
            options.method = "magnitude"
        for name, value in DEFAULTS.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        return
    with asked(ImportError, ValueError):
        check_goal(options.speedup, options.latency_ms)
    given = [name for name in DEFAULTS if getattr(options, name) is not None]
    if given:
        flag = given[0].replace("_", "-")
        raise UsageError(f"--{flag}: a latency chooses heads and hidden units, leave it out")
    if options.compensate is False or options.mean_context:
        raise UsageError("--speedup and --latency-ms count on --compensate, leave it on")
    if not compensates(options):
        raise UsageError("--speedup and --latency-ms need --data FOLDER, or --compensate")
    if options.latency_batch < 1:
        raise UsageError(f"--latency-batch: must be at least 1, got {options.latency_batch}")
    options.method = "reconstruction"


def check_model(anatomy: Anatomy, options: argparse.Namespace) -> None:
    """Raises UsageError for a request that this model cannot meet."""
    mlps = anatomy.mlps
    if options.mlp_keep is not None and not mlps:
        raise UsageError(f"--mlp-keep: no MLP of {options.model} can be pruned")
    sites = [*anatomy.attentions, *(mlps if options.mlp_keep is not None else [])]
    bare = [site.name for site in sites if getattr(site.projection, "bias", None) is None]
    if options.mean_context and bare:
        raise UsageError(f"--mean-context: needs a bias in the projections of {', '.join(bare)}")


def _check_writable(out: Path) -> None:
    """Raises UsageError before the scoring if the folder could not be made after it."""
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written: {error.strerror}") from error
