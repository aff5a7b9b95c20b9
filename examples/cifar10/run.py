# SPDX-License-Identifier: Apache-2.0
"""`python -m examples.cifar10.run --data cifar10.tar --seed 0`: train, prune, compensate, distil.

Goes on where it was stopped. The results of a seed are added to those of other seeds in the file.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from examples import results
from examples.cifar10.config import Config
from examples.cifar10.data import load
from examples.cifar10.stages import Stages
from examples.cifar10.table import table
from examples.training import command

MODULE = "examples.cifar10.run"
# The pruned model that all short trainings start from.
START = "compensated in sequence"


def run(stages: Stages) -> dict[str, dict[str, object]]:
    """All rows of a seed."""
    dense, row = stages.dense()
    rows = {"dense": row}
    print(f"dense: {row['accuracy']:.2%}", flush=True)
    made = stages.pruned(dense)
    for name, model in made.items():
        rows[name] = stages.row(model)
        print(f"{name}: {rows[name]['accuracy']:.2%}", flush=True)
    for name in ("distilled", "timm", "fine-tuned"):
        _, rows[name] = stages.recovered(name, made[START], dense)
        print(f"{name}: {rows[name]['accuracy']:.2%}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    """All stages of one seed."""
    p = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder or .tar: split/class/picture")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, default=Path("runs/example_cifar10"))
    p.add_argument("--results", type=Path, help="file to add to; default: results.json in OUTPUT")
    options = p.parse_args(argv)
    config = Config()
    path = options.results or options.output / "results.json"
    results.read(path, asdict(config))  # refuses another file's settings before the work
    learn, test = load(options.data)
    folder = options.output / f"seed{options.seed}"
    rows = run(Stages(config, learn, test, folder, options.seed))
    pictures = {"train": len(learn.labels), "test": len(test.labels)}
    found = {**results.facts(MODULE), "pictures": pictures, "rows": rows}
    results.add(path, asdict(config), f"seed {options.seed}", found)
    print(table(results.read(path, asdict(config))))
    print(f"results: {path}\nmodels and logs: {folder}")


if __name__ == "__main__":
    command(main)
