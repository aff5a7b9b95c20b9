# SPDX-License-Identifier: Apache-2.0
"""Latency tables on disk, one JSON file for each model, machine and way of running."""

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from kdfast._version import __version__
from kdfast.machine.cache import cache_folder
from kdfast.machine.facts import cpu_name
from kdfast.machine.files import replacing
from kdfast.nn.attention import qualified_name
from kdfast.ops._library import DEFAULT_BACKEND, EXTENSION
from kdfast.ops._matmul import SETTING

FORMAT = "kdfast.latency/1"
NUMBERS = ("dense_ms", "fixed_ms", "spread")


class Origin(NamedTuple):
    """Where a table is from.

    Attributes:
        text: In words.
        again: Whether there was a file that could not be used.
    """

    text: str
    again: bool = False


@dataclass(frozen=True)
class Setting:
    """What a table of latencies belongs to.

    Attributes:
        model: Digest of the model's classes and shapes.
        name: Class of the model, for people.
        device: Name of the CPU or GPU.
        isa: Instruction set of kdfast's kernels.
        threads: Of torch.
        batch: Images of a call.
        dtype: Type in which the model runs.
        image_size: (height, width).
        switches: Settings that choose kernels.
        versions: Of torch and kdfast, and a digest of kdfast's compiled part.
    """

    model: str
    name: str
    device: str
    isa: str
    threads: int
    batch: int
    dtype: str
    image_size: list[int]
    switches: list[str]
    versions: list[str]

    @classmethod
    def of(
        cls, model: nn.Module, batch: int, dtype: torch.dtype, image_size: Sequence[int]
    ) -> "Setting":
        """The setting of a model in this process."""
        device = next(model.parameters()).device
        gpu = device.type == "cuda"
        return cls(
            _shape_digest(model),
            qualified_name(model),
            torch.cuda.get_device_name(device) if gpu else cpu_name(),
            EXTENSION.cpu_isa() if EXTENSION else "none",
            torch.get_num_threads(),
            batch,
            str(dtype).removeprefix("torch."),
            list(image_size),
            [DEFAULT_BACKEND, SETTING, torch.get_float32_matmul_precision()],
            [torch.__version__, __version__, _build_digest()],
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def file(self) -> str:
        """Name of the file; versions do not count, so that a newer one replaces it."""
        content = {k: v for k, v in asdict(self).items() if k != "versions"}
        return f"{_digest(json.dumps(content, sort_keys=True))}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shape_digest(model: nn.Module) -> str:
    classes = [(name, qualified_name(module)) for name, module in model.named_modules()]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    return _digest(repr((classes, shapes)))


def _build_digest() -> str:
    path = getattr(EXTENSION, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] if path else "none"


def _path(setting: Setting, cache: str | os.PathLike[str] | bool) -> Path | None:
    if cache is False:
        return None
    folder = cache_folder() if cache is True else Path(cache)
    return folder / "latency" / setting.file


def read_table(
    setting: Setting, cache: str | os.PathLike[str] | bool
) -> tuple[dict[str, Any], Origin] | Origin:
    """The content of the file for a setting; without a usable one, what is said of the new table.

    Args:
        setting: What the table has to belong to.
        cache: As in ``latency_table``.
    """
    path = _path(setting, cache)
    if path is None or not path.exists():
        return Origin("measured now")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = _problem(content, setting)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        problem = f"is damaged ({error})"
    if problem:
        return Origin(f"measured again: {path} {problem}", again=True)
    return content, Origin(f"read from {path}, measured {content['date']}")


def write_table(
    setting: Setting, content: Mapping[str, Any], cache: str | os.PathLike[str] | bool
) -> None:
    """Writes the file, at once or not at all."""
    path = _path(setting, cache)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    full = {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "setting": asdict(setting),
        **content,
    }
    with replacing(path) as partial:
        partial.write_text(json.dumps(full, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _problem(content: Any, setting: Setting) -> str | None:
    """Why a file cannot be used, or None."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return f"is not of format {FORMAT!r}"
    wanted, found = asdict(setting), content.get("setting")
    if not isinstance(found, dict) or set(found) != set(wanted):
        return "does not say what it belongs to"
    changed = [name for name, value in wanted.items() if found[name] != value]
    if changed:
        name = changed[0]
        return f"is of other {name}, {found[name]} in place of {wanted[name]}"
    if not isinstance(content.get("date"), str) or not _is_table(content):
        return "is damaged (its numbers are no table)"
    return None


def _is_table(content: Mapping[str, Any]) -> bool:
    kinds = content.get("kinds")
    numbers = [content.get(name) for name in NUMBERS]
    if not isinstance(kinds, list) or not kinds or not all(map(_is_number, numbers)):
        return False
    if min(content["dense_ms"], content["fixed_ms"]) <= 0:
        return False
    return all(isinstance(k, dict) and _is_kind(k) for k in kinds)


def _is_kind(kind: Mapping[str, Any]) -> bool:
    if set(kind) != {"blocks", "heads", "units", "ms"}:
        return False
    if not all(isinstance(x, list) and x for x in kind.values()):
        return False
    grids = [kind["heads"], kind["units"]]
    rising = all(
        all(type(x) is int and x >= 0 for x in grid) and all(a < b for a, b in pairwise(grid))
        for grid in grids
    )
    return (
        rising
        and all(type(x) is int and x >= 0 for x in kind["blocks"])
        and len(kind["ms"]) == len(kind["heads"])
        and all(
            isinstance(row, list) and len(row) == len(kind["units"]) and all(map(_is_number, row))
            for row in kind["ms"]
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
