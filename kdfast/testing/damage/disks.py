# SPDX-License-Identifier: Apache-2.0
"""A disk that is full after any number of bytes, for everything that writes.

The system refuses every write past a limit on the size of a file, as a full disk does, and no
privileges are needed. Root can have a real one too: ``full_disk`` mounts a small one in memory.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import kdfast
from kdfast.configs.load import load as load_config
from kdfast.configs.load import save as save_config
from kdfast.machine.files import write_text
from kdfast.models.checkpoint import save_backbone
from kdfast.pruning import HeadScores, calibrate
from kdfast.pruning.heat_map import draw_head_scores
from kdfast.testing.damage.flips import KEY, Pictures, teacher
from kdfast.testing.damage.models import eva, timm_vit
from kdfast.testing.damage.tally import Tally, taken
from kdfast.trainer.commits import save_checkpoint
from kdfast.trainer.events import EventFile
from kdfast.trainer.logs import LOG, Table, close_log, open_log


def _checkpoint(folder: Path) -> None:
    save_checkpoint(folder, {"step": 1, "w": torch.randn(60_000)})


def _events(folder: Path) -> None:
    file = EventFile(folder, None)
    try:
        for step in range(2_000):
            file.add_scalar("train/total", 0.5, step)
    finally:
        file.close()


def _table(folder: Path) -> None:
    table = Table(folder / "steps.csv", None)
    for step in range(4_000):
        table.add({"step": step, "total": 0.123456789})


def _log(folder: Path) -> None:
    try:
        open_log(folder)
        LOG.handlers = [h for h in LOG.handlers if isinstance(h, logging.FileHandler)]
        for step in range(1_000):
            LOG.info("step %d %s", step, "x" * 60)
    finally:
        close_log()


def _scores() -> HeadScores:
    return HeadScores([torch.rand(400, dtype=torch.float64)] * 4, "given")


def _calibration(folder: Path) -> None:
    moments = calibrate(timm_vit().eval(), [torch.randn(4, 3, 32, 32)], progress=False)
    moments.save(folder / "c.safetensors")


WRITERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": _checkpoint,
    "saved model": lambda folder: kdfast.save_pretrained(timm_vit(), folder),
    "backbone": lambda folder: save_backbone(eva(), folder / "b.safetensors"),
    "calibration": _calibration,
    "teacher cache": lambda folder: kdfast.chain.teacher_cache.TeacherCache.build(
        teacher, Pictures(), folder / "cache", key={**KEY, "long": "x" * 5_000}, rebuild=True
    ),
    "head scores": lambda folder: _scores().save(folder / "scores.json"),
    "picture": lambda folder: draw_head_scores(_scores(), [[0]] * 4, folder / "heads.png"),
    "report": lambda folder: write_text(folder / "report.json", json.dumps([0.1] * 20_000)),
    "config": lambda folder: save_config(load_config("smoke"), folder / "config.yaml"),
    "steps.csv": _table,
    "train.log": _log,
    "TensorBoard": _events,
}
# These grow; others are replaced as a whole.
GROW = ("steps.csv", "train.log", "TensorBoard", "teacher cache")


def full(tally: Tally, root: Path, sizes: list[int], names: list[str] | None = None) -> None:
    """Every writer with files of at most so many bytes; the file before has to stay as it was."""
    tally.counts.setdefault("full disk", collections.Counter())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in names or WRITERS:
        for size in sizes:
            folder = root / f"{name} {size}"
            folder.mkdir(parents=True)
            if name not in GROW:
                WRITERS[name](folder)
            before, told = taken(folder), tally.counts["full disk"]["seen"]

            def write(name: str = name, folder: Path = folder, size: int = size) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
                try:
                    WRITERS[name](folder)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

            def fine(_: object, folder: Path = folder, size: int = size) -> str | None:
                largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                return None if largest <= size else "it wrote more than there was room for"

            tally.trial("full disk", f"{name} at {size:,} bytes", write, fine, str(folder))
            failed = tally.counts["full disk"]["seen"] > told
            if failed and name not in GROW and taken(folder) != before:
                tally.fault("full disk", f"{name} at {size:,} bytes: the file before is gone")
            if left := [path.name for path in folder.rglob(".*")]:
                tally.fault("full disk", f"{name} at {size:,} bytes: {left[0]} is left")


def permissions(tally: Tally, root: Path) -> None:
    """Every writer under two umasks: files and folders have what any new file has."""
    for mask in (0o022, 0o077):
        for name, write in WRITERS.items():
            folder = root / f"{name} {mask:o}"
            before = os.umask(mask)
            try:
                folder.mkdir(parents=True)
                write(folder)
            finally:
                os.umask(before)
            counts = tally.counts.setdefault("permissions", collections.Counter())
            for path in [folder, *folder.rglob("*")]:
                counts["tried"] += 1
                want = (0o777 if path.is_dir() else 0o666) & ~mask
                found = stat.S_IMODE(path.stat().st_mode)
                if found != want:
                    tally.fault("permissions", f"{path} has {found:o}, not {want:o}")
                else:
                    counts["harmless"] += 1


def full_disk(tally: Tally, sizes: list[str]) -> None:
    """A training on a small disk in memory, then resumed on a larger one; left out without root."""
    counts = tally.counts.setdefault("training on a full disk", collections.Counter())
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                return
            try:
                counts["tried"] += 1
                first = _train(folder)
                if first[0] == 0:
                    counts["harmless"] += 1
                    continue
                if not (first[0] == 1 and first[1].startswith("error: ") and _NO_ROOM in first[1]):
                    tally.fault("training on a full disk", f"{size}: status {first}")
                    continue
                counts["seen"] += 1
                subprocess.run(["mount", "-o", "remount,size=256m", folder], check=True)
                again = _train(folder, "--resume")
                if again[0] and "there is no run" not in again[1]:
                    tally.fault("training on a full disk", f"{size}, resumed: status {again}")
            finally:
                subprocess.run(["umount", folder], check=True)


_NO_ROOM = "no space left"


def _train(folder: str, *more: str) -> tuple[int, str]:
    """Status and last line of a small training; a traceback counts as that."""
    command = [sys.executable, "-m", "kdfast.train", "--config", "smoke", "--set", "output=a"]
    command += ["--set", "teacher.cache=tc", "--set", "run.save_every=2"]
    done = subprocess.run(
        [*command, *more], cwd=folder, capture_output=True, text=True, check=False
    )
    lines = done.stderr.strip().splitlines() or [""]
    trace = "Traceback" in done.stdout + done.stderr
    return done.returncode, f"Traceback: {lines[-1]}" if trace else lines[-1]
