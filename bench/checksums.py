# SPDX-License-Identifier: Apache-2.0
"""What checksums cost: `python -m bench.checksums --save FILE`, medians on one thread.

Files are in the page cache, so that the disk does not count. FILE belongs into bench/results, as
FAMILY_checksums.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.saved import save_rows
from kdfast.chain.cache_sums import row_sums
from kdfast.machine.archive import check_archive
from kdfast.machine.digest import file_digest

BYTES, ROUNDS, ROWS = 1 << 28, 7, 256


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call, after one that does not count."""
    call()
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measured(folder: Path) -> list[dict[str, Any]]:
    """One row for each kind of checksum."""
    path = folder / "last.pt"
    torch.save({"weights": torch.randn(BYTES // 4)}, path)
    size = path.stat().st_size / 1e9
    whole: dict[str, Callable[[], object]] = {
        "SHA-256 of a file": lambda: file_digest(path),
        "CRC-32 of a checkpoint": lambda: check_archive(path),
    }
    rows: list[dict[str, Any]] = [
        {"what": name, "s_per_gb": round(seconds(call) / size, 3)} for name, call in whole.items()
    ]
    index = np.arange(ROWS)
    for classes in (16, 1000):
        logits = {"logits": np.random.default_rng(0).random((ROWS, classes), np.float32)}
        taken = seconds(partial(row_sums, logits, index * 0, index))
        name = f"CRC-32 of a cached row, {classes} classes"
        rows.append({"what": name, "us": round(taken / ROWS * 1e6, 3)})
    return rows


def main() -> None:
    """Measures and prints, or writes the result file."""
    p = argparse.ArgumentParser(prog="python -m bench.checksums", description=__doc__)
    p.add_argument("--save", type=Path)
    options = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder))
    for row in rows:
        print(row)
    if options.save:
        save_rows(options.save, "bench.checksums", {}, rows)


if __name__ == "__main__":
    main()
