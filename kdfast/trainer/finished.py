# SPDX-License-Identifier: Apache-2.0
"""What finished runs say of their models, read from the files that they left."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdfast.machine.limits import MAX_TEXT

# Files of a run by the trainer that writes them: a chain, or a pruning or distilling run.
CHAIN, REPORT, CONFIG = "comparison.json", "report.json", "config.yaml"
# The measure that stands for a distillation: the first that it has.
MEASURES = ("accuracy", "agreement", "cosine")


@dataclass(frozen=True)
class RunModel:
    """One model of a finished run.

    Attributes:
        run: Folder of the run.
        data: What it was trained on.
        role: What it is in the run.
        model: Its architecture, where the run says it.
        params: Number of parameters.
        metric: Name of ``quality``, measured on held-out pictures.
        quality: A share in [0, 1], the mean of several seeds.
        spread: Standard deviation over seeds; None: one seed.
        seconds: Of its training; None where the run does not say.
        ms: Of one picture, on the machine and in the moment of the run; None likewise.
    """

    run: str
    data: str
    role: str
    model: str
    params: int
    metric: str
    quality: float
    spread: float | None = None
    seconds: float | None = None
    ms: float | None = None


def read_run(folder: Path) -> list[RunModel]:
    """The models of a finished run, in its order.

    Args:
        folder: Of a chain, a pruning run or a distillation.

    Raises:
        ValueError: It is no folder of a finished run, or its files are damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} must be the folder of a run, and there is none")
    for name, read in ((CHAIN, _of_chain), (REPORT, _of_report)):
        if (folder / name).is_file():
            found = _text(folder / name, json.loads)
            try:
                return read(folder.name, _data(folder), found)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{folder / name} is not what a run writes: {error!r}") from error
    raise ValueError(f"{folder} must hold {CHAIN} or {REPORT}, which a run writes at its end")


def _text(path: Path, parse: Any) -> Any:
    size, limit = path.stat().st_size, MAX_TEXT()
    if size > limit:
        raise ValueError(f"{path} must have at most {limit:,} bytes, got {size:,}")
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _data(folder: Path) -> str:
    """The data of a run in a word: their folder, or else their set or kind."""
    if not (folder / CONFIG).is_file():
        return ""
    config = _text(folder / CONFIG, yaml.safe_load)
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict):
        return Path(data).name if isinstance(data, str) else ""
    named = data.get("root") or data.get("set") or data.get("kind") or ""
    return Path(str(named)).name


def _of_chain(run: str, data: str, found: Mapping[str, Any]) -> list[RunModel]:
    rows = []
    for link in found["links"]:
        mean, spread = link["mean"], link["spread"]["test_accuracy"]
        rows.append(
            RunModel(
                run=run,
                data=data,
                role=link["role"],
                model=link["model"],
                params=int(link["params"]),
                metric="accuracy",
                quality=_number(mean["test_accuracy"]) / 100,
                spread=None if spread is None else _number(spread) / 100,
                seconds=_number(mean["seconds"]),
            )
        )
    return rows


def _of_report(run: str, data: str, found: Mapping[str, Any]) -> list[RunModel]:
    rows = []
    for line in found["models"]:
        quality = line["quality"]
        if isinstance(quality, dict):
            metric = next(name for name in MEASURES if quality.get(name) is not None)
            quality = quality[metric]
        else:
            metric = str(found["metric"])
        rows.append(
            RunModel(
                run=run,
                data=data,
                role=line["model"],
                model="",
                params=int(line["params"]),
                metric=metric,
                quality=_number(quality),
                ms=_number(line["ms"]),
            )
        )
    return rows


def _number(value: Any) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.nan
