# SPDX-License-Identifier: Apache-2.0
"""What a speedup costs: `python -m bench.latency MODEL PICTURES --speedup 1.5 --save FILE`.

MODEL is what `kdfast.prune --model` takes, PICTURES a folder. Heads and hidden units are chosen by
measured times, and by FLOPs to the same predicted time; nothing is trained. Times are those of both
models accelerated. Tokens are compared as `bench.compensation` does it, on pictures that the
calibration has not seen. FILE belongs into bench/results, as FAMILY_speedup.json.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import kdfast
from bench.compensation import agreement, chosen_pictures, tokens
from bench.saved import save_rows
from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.block_times import LatencyTable, latency_table
from kdfast.pruning.by_latency import LatencySelection, losses_of, selected
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.latency_goal import Goal, Outcome, corrected, tried
from kdfast.sources import load_model


def by_flops(
    anatomy: Anatomy, calibration: kdfast.Calibration, table: LatencyTable, goal_ms: float
) -> LatencySelection:
    """The largest share of the FLOPs whose predicted time meets the goal, to a thousandth."""
    model = anatomy.model
    heads = kdfast.head_scores(model, "reconstruction", calibration)
    units = kdfast.mlp_scores(model, "reconstruction", calibration)
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        keep = (low + high) / 2
        kept, mlp = kdfast.select_together(model, heads, units, keep)
        ms = table.predict([len(row) for row in kept], [len(row) for row in mlp])
        low, high = (keep, high) if ms <= goal_ms else (low, keep)
    kept, mlp = kdfast.select_together(model, heads, units, low)
    ms = table.predict([len(row) for row in kept], [len(row) for row in mlp])
    empty = [i for i, pair in enumerate(zip(kept, mlp, strict=True)) if not any(pair)]
    return LatencySelection(kept, mlp, ms, table.dense_ms, float("nan"), empty, table)


def row_of(
    name: str,
    outcome: Outcome,
    model: nn.Module,
    agree: Callable[[nn.Module], tuple[float, float]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Times of a selection, and what it is worth once compensated."""
    chosen = outcome.selection
    small = kdfast.prune_heads(model, chosen.heads, mlp=chosen.mlp, **options)
    dropped = kdfast.drop_blocks(small).dropped
    cosine, error = agree(small)
    return {
        "choice": name,
        "predicted_ms": round(outcome.predicted_ms, 3),
        "measured_ms": round(outcome.pruned.ms, 3),
        "dense_ms": round(outcome.dense.ms, 3),
        "deviation": round(outcome.pruned.ms / outcome.predicted_ms - 1, 4),
        "speedup": round(outcome.speedup, 3),
        "spread": round(outcome.spread, 4),
        "factor": round(outcome.factor, 4),
        "heads": [len(row) for row in chosen.heads],
        "units": [len(row) for row in chosen.mlp or []],
        "dropped": dropped,
        "parameters": sum(p.numel() for p in small.parameters()),
        "cosine": round(cosine, 4),
        "relative_error": round(error, 4),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    p.add_argument("model")
    p.add_argument("pictures", type=Path)
    p.add_argument("--speedup", type=float, default=1.5)
    p.add_argument("--sequential", action="store_true", help="the slower, better compensation")
    p.add_argument("--calibrate", type=int, default=200, help="pictures to calibrate on")
    p.add_argument("--test", type=int, default=40, help="other pictures to compare on")
    p.add_argument("--batch-size", type=int, default=20)
    p.add_argument("--rounds", type=int, default=31, help="samples of a time")
    p.add_argument("--save", type=Path, help="file to write")
    return p.parse_args()


def main() -> None:
    """Measures, chooses, prunes, and prints a row for each choice."""
    options = arguments()
    model = load_model(options.model)
    anatomy = anatomy_of("bench.latency", model)
    size = anatomy.adapter.image_size(model)
    data, test = chosen_pictures(model, size, options)
    held, seen = (list(x.split(options.batch_size)) for x in (test, data))
    calibration = kdfast.calibrate(model, seen)
    goal = Goal(options.speedup, None)
    # Always measured: the numbers are of this commit.
    table = latency_table(model, cache=False)
    losses = losses_of(anatomy, calibration, True)
    budget = goal.ms(table.dense_ms)
    image = data[:1]
    first = tried(model, selected(anatomy, losses, table, budget), image, options.rounds)
    rows = {"by latency": first}
    if first.misses(goal):
        again = corrected(anatomy, losses, first, goal)
        timed = tried(model, again.selection, image, options.rounds, again.factor)
        rows["by latency, corrected"] = timed
    flops = by_flops(anatomy, calibration, table, budget)
    rows["by FLOPs, same predicted time"] = tried(model, flops, image, options.rounds)
    want = tokens(model, held)

    def agree(small: nn.Module) -> tuple[float, float]:
        return agreement(tokens(small, held), want)

    fit: dict[str, Any] = {"compensate": calibration, "data": seen}
    fit["sequential"] = options.sequential
    results = [row_of(name, outcome, model, agree, fit) for name, outcome in rows.items()]
    for row in results:
        print(json.dumps(row), flush=True)
    if options.save:
        save(options, table, results, data, test)


def save(
    options: argparse.Namespace,
    table: LatencyTable,
    rows: list[dict[str, Any]],
    data: Tensor,
    test: Tensor,
) -> None:
    """Writes the result file."""
    kinds = [
        {**vars(kind), "ms": [[round(x, 4) for x in row] for row in kind.ms]}
        for kind in table.kinds
    ]
    facts = {
        "pictures": {"calibration": len(data), "held out": len(test)},
        "dtype": table.setting.dtype,
        "dense_ms": round(table.dense_ms, 3),
        "fixed_ms": round(table.fixed_ms, 3),
        "spread": round(table.spread, 4),
        "kinds": kinds,
    }
    save_rows(options.save, "bench.latency", facts, rows)


if __name__ == "__main__":
    main()
