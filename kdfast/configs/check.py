# SPDX-License-Identifier: Apache-2.0
"""Problems of a config that involve more than one key, the file system or the machine."""

from __future__ import annotations

from pathlib import Path

from kdfast.configs.chain import INITS, ChainConfig, roles, stages
from kdfast.configs.recovery import Config


def check(config: Config | ChainConfig) -> list[str]:
    """One line for everything that is wrong."""
    return _check_chain(config) if isinstance(config, ChainConfig) else _check_recovery(config)


def _check_recovery(config: Config) -> list[str]:
    found: list[str] = []
    teacher, data, run = config.teacher, config.data, config.run
    if teacher.checkpoint is None and teacher.fit is None:
        found.append("teacher.checkpoint: must name a file, or teacher.fit say how to train one")
    if teacher.checkpoint is None and data.kind not in ("scenes", "frames"):
        found.append(f"teacher.checkpoint: {data.kind} has no labels to train one, must be a file")
    if data.kind == "frames":
        found += _check_frames(config)
    elif config.distill.vl:
        found.append(f"distill.vl: needs the heads of data.kind frames, got {data.kind}")
    if teacher.checkpoint is not None and not _is_model(teacher.checkpoint, data.kind):
        found.append(f"teacher.checkpoint: {_no_model(teacher.checkpoint, data.kind)}")
    if teacher.checkpoint is None and (shape := teacher.shape()):
        names = ", ".join(f"teacher.{name}" for name in shape)
        found.append(f"{names}: describe a teacher.checkpoint, got none")
    if config.prune.heads is not None and not Path(config.prune.heads).expanduser().is_file():
        found.append(f"prune.heads: no such file: {config.prune.heads}")
    if data.kind != "scenes" and data.root is None:
        found.append(f"data.root: {data.kind} needs a folder")
    elif data.kind not in ("scenes", "frames") and not Path(str(data.root)).expanduser().is_dir():
        found.append(f"data.root: no such folder: {data.root}")
    prune = config.prune
    if prune.heads is not None and not Path(prune.heads).expanduser().is_file():
        found.append(f"prune.heads: no such file: {prune.heads}")
    for name in ("keep", "mlp_keep"):
        if prune.scope == "global" and isinstance(getattr(prune, name), tuple):
            found.append(f"prune.{name}: a number for each block needs prune.scope block")
    if data.cache and data.augment:
        found.append("data.cache: needs data.augment false, got true")
    if config.distill.feature + config.distill.attention + config.distill.output == 0:
        found.append("distill: feature, attention and output must not all be 0")
    return found + check_device(run.device, run.precision, "run.")


def _is_model(checkpoint: str, kind: str) -> bool:
    """Whether a teacher is there: a file, or a saved model's folder, which has no heads."""
    path = Path(checkpoint).expanduser()
    return path.is_file() or (kind != "frames" and (path / "config.json").is_file())


def _no_model(checkpoint: str, kind: str) -> str:
    """What is wrong with a teacher that ``_is_model`` refuses."""
    if Path(checkpoint).expanduser().is_dir():
        wanted = "a file with ORION's heads" if kind == "frames" else "a file or a saved model"
        return f"must be {wanted}, got the folder {checkpoint}"
    return f"no such file: {checkpoint}"


def _check_frames(config: Config) -> list[str]:
    """Problems of a run with ORION's heads."""
    data, fit = config.data, config.teacher.fit
    found: list[str] = []
    if config.teacher.checkpoint is None and fit is not None and fit.heads is None:
        found.append("teacher.fit.heads: must be the sizes of the heads of data.kind frames")
    root = None if data.root is None else Path(data.root).expanduser()
    if root is not None and (root.is_dir() or not data.sample):
        absent = [
            name
            for name in ("kdfast_infos_train", "kdfast_infos_val", "kdfast_maps")
            if not (root / name).is_dir()
        ]
        if absent:
            found.append(
                f"data.root: {data.root} must hold {', '.join(absent)}; make them with "
                f"`kdfast data infos --root {data.root}`"
            )
    if data.cache:
        found.append("data.cache: not for data.kind frames, got true")
    return found


def _check_chain(config: ChainConfig) -> list[str]:
    found: list[str] = []
    count = len(config.chain)
    if not count:
        found.append("chain: must name at least one model, got none")
    for name in ("model_args", "init", "batch", "epochs"):
        value = getattr(config, name)
        fits = not isinstance(value, tuple) or len(value) in (1, count)
        if not fits and (value or name != "model_args"):
            found.append(
                f"{name}: must have one entry, or one for each of the {count} links, "
                f"got {len(value)}"
            )
    inits = (config.init,) if isinstance(config.init, str) else config.init
    for init in inits:
        if init not in INITS and not Path(init).expanduser().is_file():
            found.append(f"init: must be {' or '.join(INITS)}, or a file, got {init!r}")
    if not stages(config):
        known = ", ".join(["all", *roles(count)])
        found.append(f"stage: must be one of {known}, got {config.stage!r}")
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        found.append(f"seeds: must be different numbers, at least one, got {list(config.seeds)}")
    if config.twin and count < 2:
        found.append("twin: needs a chain of two or more links")
    data = config.data
    if (data.kind == "medmnist") != (data.set is not None):
        found.append(
            f"data.set: must name the set of data.kind medmnist, such as pathmnist, got {data.set} "
            f"with data.kind {data.kind}"
        )
    found += _check_training(config)
    return found + check_device(config.device, config.precision)


def _check_training(config: ChainConfig) -> list[str]:
    found: list[str] = []
    optim, distill = config.optim, config.distill
    mixing = optim.mixup > 0 or optim.cutmix > 0
    if config.cache and mixing:
        found.append(
            "cache: needs images that come again, but optim.mixup and optim.cutmix make new ones; "
            "set them to 0, or cache to false"
        )
    if config.cache and (distill.attention or distill.feature):
        found.append(
            "cache: holds the teacher's logits only; set distill.attention and distill.feature to 0"
        )
    if distill.focal_alpha is not None and not distill.focal_gamma:
        found.append(f"distill.focal_alpha: needs a distill.focal_gamma, got {distill.focal_alpha}")
    for name in ("class_weights", "pos_weights"):
        value = getattr(distill, name)
        if isinstance(value, tuple) and not any(value):
            found.append(f"distill.{name}: must have a number above 0, got {list(value)}")
    batches = config.batch if isinstance(config.batch, tuple) else (config.batch,)
    if mixing and any(isinstance(b, int) and b % 2 for b in batches):
        found.append("batch: must be even for optim.mixup and optim.cutmix")
    return found


def check_device(device: str, precision: str, prefix: str = "") -> list[str]:
    """Problems of a device and a precision on this machine."""
    # Imported here: it takes seconds, and the help of a command needs configs without it.
    import torch

    found: list[str] = []
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if precision == "fp16" and not cuda:
        found.append(f"{prefix}precision: fp16 needs a GPU for loss scaling; use bf16 or fp32")
    if device == "cuda" and not torch.cuda.is_available():
        found.append(f"{prefix}device: torch finds no GPU")
    return found
