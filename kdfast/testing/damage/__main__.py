# SPDX-License-Identifier: Apache-2.0
"""Damages files and reads them: ``python -m kdfast.testing.damage``.

Flips single bits in everything that is written, edits folders of models, makes small files that ask
for much, and fills the disk under every writer. A damaged file must end in an error that names it,
or change nothing. Prints each fault, and a table of what was tried.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as library_log

from kdfast.rivals.rival import quiet
from kdfast.testing.damage import bombs, disks, edits, flips
from kdfast.testing.damage.models import MAKERS
from kdfast.testing.damage.tally import Tally, watch_opened

PARTS = ("flips", "edits", "bombs", "disks")
SIZES = [0, 1, 100, 4096, 30_000, 100_000, 1 << 30]
DISKS = ["64k", "256k", "1m", "2m", "3m", "5m", "8m"]


def run(
    parts: list[str], tally: Tally, root: Path, *, flipped: int, edited: int, seed: int
) -> None:
    """Runs parts.

    Args:
        parts: Of ``PARTS``.
        tally: Counts.
        root: Folder for the files.
        flipped: Bits to flip in each kind of file.
        edited: Edits of each kind of folder.
        seed: Draws them.
    """
    watch_opened()
    draw = random.Random(seed)
    if "flips" in parts:
        for number, subject in enumerate(flips.subjects()):
            flips.flip(tally, subject, root / f"flips{number}", flipped, draw)
    if "edits" in parts:
        for name in MAKERS:
            edits.edited_json(tally, root / "json", name, edited, draw)
            edits.edited_tensors(tally, root / "tensors", name, edited // 2, draw)
        edits.hostile_files(tally, root)
    if "bombs" in parts:
        for make in (bombs.pictures, bombs.archives, bombs.configs):
            folder = root / make.__name__
            folder.mkdir()
            make(tally, folder)
    if "disks" in parts:
        disks.full(tally, root / "full", SIZES)
        disks.permissions(tally, root / "umask")
        disks.full_disk(tally, DISKS)


@contextmanager
def calm() -> Iterator[None]:
    """One thread, and no word or progress bar of libraries; as it was before at the end."""
    threads, bars = torch.get_num_threads(), library_log.is_progress_bar_enabled()
    torch.set_num_threads(1)
    library_log.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            library_log.enable_progress_bar()


def main() -> int:
    """Runs the command; 1 if there were faults."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m kdfast.testing.damage")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all if left out")
    parser.add_argument("--flips", type=int, default=300, help="bits of each kind of file")
    parser.add_argument("--edits", type=int, default=200, help="edits of each kind of folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began, tally = time.monotonic(), Tally()
    with calm(), tempfile.TemporaryDirectory() as root:
        run(
            args.parts or list(PARTS),
            tally,
            Path(root),
            flipped=args.flips,
            edited=args.edits,
            seed=args.seed,
        )
    print(tally.table())
    seconds = time.monotonic() - began
    print(f"{len(tally.faults)} faults, {seconds:.0f} s, seed {args.seed}")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
