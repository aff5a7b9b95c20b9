# SPDX-License-Identifier: Apache-2.0
"""What is left of a trained model after pruning: `bench.compensation MODEL PICTURES --save FILE`.

MODEL is what `kdfast.prune --model` takes, PICTURES a folder. Half of the heads and half of the
hidden units go, or both together half of the FLOPs; nothing is trained. Tokens of the pruned model
are compared with the whole model's on pictures that the calibration has not seen: the mean cosine,
and the mean relative error. FILE belongs into bench/results, as FAMILY_compensation.json.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdfast
from bench.saved import save_rows
from kdfast.data.files import list_images
from kdfast.machine.facts import cpu_name
from kdfast.pruning.families import anatomy_of
from kdfast.sources import load_images, load_model, transform_of


def tokens(model: Any, batches: list[Tensor]) -> Tensor:
    """Tokens (T, C) of all pictures after the last norm, or whatever the model gives."""
    run, rows = getattr(model, "forward_features", model), []
    for batch in batches:
        with torch.no_grad():
            out = run(batch)
        out = out if isinstance(out, Tensor) else out[0]
        # A map (B, C, H, W) has its channels second.
        out = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out
        rows.append(out.float().flatten(0, -2))
    return torch.cat(rows)


def agreement(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Mean cosine of tokens and mean relative error."""
    cosine = F.cosine_similarity(got, want, dim=-1).mean()
    return cosine.item(), ((got - want).norm(dim=-1) / want.norm(dim=-1)).mean().item()


def pruned_models(
    model: nn.Module,
    calibration: kdfast.Calibration,
    data: list[Tensor],
    options: argparse.Namespace,
) -> Iterator[tuple[str, str, nn.Module, float]]:
    """Scope, treatment, pruned model and seconds of each row."""
    scores = kdfast.head_scores(model, "reconstruction", calibration)
    units = kdfast.mlp_scores(model, "reconstruction", calibration)
    treatments: dict[str, dict[str, Any]] = {
        "cut": {},
        "mean": {"mean_context": True, "data": data},
        "at once": {"compensate": calibration, "data": data},
        "sequential": {"compensate": calibration, "data": data, "sequential": True},
    }
    for scope in ("block", "global", "together"):
        if scope == "together":
            heads, mlp = kdfast.select_together(model, scores, units, options.keep)
        else:
            heads = kdfast.select_heads(scores, options.keep, scope, 0)
            mlp = kdfast.select_heads(units, options.keep, scope, 0)
        for name, given in treatments.items():
            start = time.perf_counter()
            pruned = kdfast.prune_heads(model, heads, mlp=mlp, **given)
            yield scope, name, pruned, time.perf_counter() - start


def chosen_pictures(
    model: nn.Module, size: tuple[int, int], options: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Pictures to calibrate on, and others to compare on."""
    names = list_images(options.pictures)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [options.pictures / names[i] for i in order[: options.calibrate + options.test]]
    pictures = load_images(chosen, transform_of(model, size))
    return pictures[: options.calibrate], pictures[options.calibrate :]


def main() -> None:
    """Calibrates, prunes in every way and prints a table."""
    p = argparse.ArgumentParser(prog="python -m bench.compensation", description=__doc__)
    p.add_argument("model")
    p.add_argument("pictures", type=Path)
    p.add_argument("--calibrate", type=int, default=200, help="pictures to calibrate on")
    p.add_argument("--test", type=int, default=40, help="other pictures to compare on")
    p.add_argument("--keep", type=float, default=0.5)
    p.add_argument("--batch-size", type=int, default=20)
    p.add_argument("--save", type=Path, help="result file")
    options = p.parse_args()
    model = load_model(options.model)
    size = anatomy_of("bench.compensation", model).adapter.image_size(model)
    data, test = chosen_pictures(model, size, options)
    held, seen = (list(x.split(options.batch_size)) for x in (test, data))
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, {len(data)} pictures, {len(test)} held"
    )
    start = time.perf_counter()
    calibration = kdfast.calibrate(model, seen)
    print(f"calibration: {time.perf_counter() - start:.0f} s", flush=True)
    want = tokens(model, held)
    print("| budget | treatment | cosine | relative error | seconds |")
    print("| --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for scope, name, pruned, seconds in pruned_models(model, calibration, seen, options):
        cosine, error = agreement(tokens(pruned, held), want)
        print(f"| {scope} | {name} | {cosine:.3f} | {error:.2f} | {seconds:.0f} |", flush=True)
        agreed = {"cosine": round(cosine, 4), "relative_error": round(error, 4)}
        rows.append({"budget": scope, "treatment": name, **agreed, "s": round(seconds, 1)})
    if options.save:
        pictures = {"calibration": len(data), "held out": len(test)}
        save_rows(options.save, "bench.compensation", {"pictures": pictures}, rows)


if __name__ == "__main__":
    main()
