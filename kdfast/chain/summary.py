# SPDX-License-Identifier: Apache-2.0
"""The end of a link: the test of its best weights, and the files about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdfast.chain.compare import VALUES
from kdfast.chain.evaluate import held_out_feed
from kdfast.chain.link_run import DEFAULTS, LinkRun
from kdfast.chain.metrics import Meter
from kdfast.chain.plots import draw_attention, draw_confusion, draw_curves
from kdfast.chain.watch import LinkWatch
from kdfast.configs import ConfigError, plain
from kdfast.configs.fields import as_config_error
from kdfast.machine.files import write_text
from kdfast.machine.memory import peak_mib
from kdfast.resolve.link_file import weights_of
from kdfast.trainer.commits import BEST, load_checkpoint
from kdfast.trainer.logs import LOG
from kdfast.trainer.runs import refuse_other
from kdfast.trainer.state import differences

# Its presence says that a link is finished.
SUMMARY = "summary.json"
REQUIRED = ("role", "seed", "data", "model", "params", "folder", "recipe", *VALUES)


def finish_link(run: LinkRun, watch: LinkWatch, *, batch: int, seconds: float) -> dict[str, Any]:
    """Test the best weights and write the files about a finished link.

    Args:
        run: What was trained.
        watch: Followed the training; its student gets the best weights.
        batch: Images per step.
        seconds: Time of the training.

    Returns:
        The link's summary.

    Raises:
        ConfigError: The best weights are gone or damaged.
    """
    data, link, student = run.data, run.link, watch.student
    accelerator = watch.accelerator
    if not watch.best:
        raise ConfigError(
            [f"{link.role}: {run.checkpoints / BEST} is gone, and no epoch is left to make another"]
        )
    with as_config_error():
        student.net.load_state_dict(weights_of(load_checkpoint(run.checkpoints / BEST)))
    meter = watch.evaluate(student, held_out_feed(run, data.test, accelerator.device))
    test = meter.compute()
    peaks = peak_mib(accelerator.device)
    summary = {
        "role": link.role,
        "model": link.model,
        "args": link.args,
        "data": data.name,
        "seed": run.seed,
        "params": student.count,
        "batch": batch,
        "parts": watch.step.parts,
        "best_epoch": int(watch.best["epoch"]),
        "val_accuracy": watch.best["val_accuracy"],
        **{f"test_{name}": value for name, value in test.items()},
        "seconds": seconds,
        "peak_mib": peaks["gpu"] or peaks["host"],
        "folder": str(run.folder),
    }
    if accelerator.is_main_process:
        _write_files(run, watch, meter, summary)
        # Last, because its presence says that all files are there.
        _json(run.folder / SUMMARY, {**summary, "recipe": run.recipe})
        LOG.info(
            "%s: best epoch %d, val %.2f, test %.2f, peak memory %.0f MiB",
            *(link.role, summary["best_epoch"], summary["val_accuracy"], test["accuracy"]),
            summary["peak_mib"],
        )
    return summary


def summary_of(run: LinkRun) -> dict[str, Any] | None:
    """The summary of a link that was finished earlier; None: it was not.

    Raises:
        ConfigError: It was trained with another recipe.
    """
    path = run.folder / SUMMARY
    if not path.is_file():
        return None
    summary = read_summary(path)
    if summary is None:
        return None
    mine = json.loads(json.dumps(run.recipe))
    refuse_other(
        f"{run.link.role} in {run.folder}", differences(summary.pop("recipe"), mine, DEFAULTS)
    )
    LOG.info("%s (seed %d) is finished: %s", run.link.role, run.seed, run.folder)
    return summary


def read_summary(path: Path) -> dict[str, Any] | None:
    """What ``finish_link`` wrote, or None, with a word in the log, for a file that is not whole."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
        missing = [name for name in REQUIRED if name not in summary]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (TypeError, ValueError) as error:
        LOG.warning("%s is not whole, its link counts as unfinished: %s", path, error)
        return None
    return summary


def _write_files(run: LinkRun, watch: LinkWatch, meter: Meter, summary: dict[str, Any]) -> None:
    data, logs, pictures = run.data, run.logs, run.folder / "visualizations"
    pictures.mkdir(parents=True, exist_ok=True)
    best: dict[str, float] = {}
    for name, (value, epoch) in watch.records.items():
        best |= {f"best_{name}": value, f"best_{name}_epoch": epoch}
    seen = meter.gathered()
    scores = meter.per_class(seen["pred"], seen["target"])
    per_class = {
        name: {key: 100 * float(value[i]) for key, value in scores.items()}
        for i, name in enumerate(data.class_names)
    }
    test = {k: v for k, v in summary.items() if k.startswith("test_")}
    counts = meter.confusion(seen["pred"], seen["target"])
    _json(
        logs / f"{run.name}_best_metrics.json",
        {**best, **test, "test_per_class": per_class, "test_confusion": counts.tolist()},
    )
    settings = {"config": plain(run.config), "link": asdict(run.link), "seed": run.seed}
    _json(logs / f"{run.name}_config.json", settings)
    size = f"{summary['params'] / 1e6:.2f}M parameters"  # a name of timm says little with args
    title = f"{run.link.role}: {run.link.model}, {size}, on {data.name}, seed {run.seed}"
    note = "train: with distillation" if run.teacher is not None else "task only"
    draw_curves(logs / f"{run.name}_log.csv", pictures / "curves.png", title, note)
    draw_confusion(counts, data.class_names, pictures / "confusion.png", f"{title}, test images")
    draw_attention(watch.student, data, pictures, title, watch.accelerator.device)


def _json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
