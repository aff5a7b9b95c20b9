# SPDX-License-Identifier: Apache-2.0
"""``kdfast.distil``: what is asked for is checked, then a run begins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import nn

from kdfast.configs.distil import DistilConfig, distil_config
from kdfast.configs.fields import ConfigError, as_config_error, plain
from kdfast.data.files import CorruptDataError
from kdfast.distillation.pictures import Listed, class_numbers, list_pictures
from kdfast.distillation.run import Distilled, Run
from kdfast.distillation.terms import find_terms
from kdfast.machine.files import write_text
from kdfast.matching.layers import name_of
from kdfast.models.eva import EVAViT
from kdfast.models.prepared import PreparedModel, input_config
from kdfast.trainer.logs import close_log
from kdfast.trainer.processes import make_accelerator
from kdfast.trainer.runs import (
    discard_folder,
    release_folder,
    run_folder,
    show_start,
    started_again,
)
from kdfast.trainer.state import seed_everything


def distil(
    student: nn.Module,
    teacher: nn.Module,
    data: str | os.PathLike[str],
    *,
    resume: bool = False,
    names: tuple[str, str] | None = None,
    origin: Mapping[str, Any] | None = None,
    **options: Any,
) -> Distilled | None:
    """Trains a student to do what its teacher does: docs/use/distil.md.

    Where the student was cut from the teacher (``kdfast.prune_heads``), its blocks and heads are
    compared with those that they were. Both models are accelerated in place, unless
    ``accelerate=False``; the teacher's weights, mode and flags stay as they are.

    Args:
        student: Of timm, torchvision or Hugging Face; trained in place.
        teacher: Of the same, perhaps the model that the student was cut from.
        data: Folder or uncompressed .tar of pictures at any depth, with ``labels=True`` of one
            folder a class.
        resume: Go on with the newest run of ``output``; models as at its beginning.
        names: Of student and teacher, for the log; timm's names or their classes if None.
        origin: What else ``config.yaml`` shall say of the models and the data.
        **options: Fields of ``kdfast.configs.distil.DistilConfig``.

    Returns:
        The trained student, its folder and the table; None where ``max_steps`` ended it early.

    Raises:
        ConfigError: An option, the data or a checkpoint cannot be used, the models have nothing to
            compare, or a term that was asked for cannot be formed.
        CorruptDataError: A picture cannot be read.
        Interrupted: A signal came; the state was saved.
        NonFiniteLoss: The training broke; the state before was saved.
    """
    config = distil_config(options)
    for what, model in (("student", student), ("teacher", teacher)):
        if isinstance(model, EVAViT):
            raise ConfigError(
                [f"{what}: ORION's encoder has a trainer of its own: kdfast train --config orion50"]
            )
    before = [(model, model.training) for model in teacher.modules()]
    flags = [(p, p.requires_grad) for p in (*teacher.parameters(), *student.parameters())]
    accelerator = make_accelerator(config.precision, config.device, config.shard)
    try:
        seed_everything(config.seed)
        with as_config_error():
            listed = list_pictures(Path(data), config)
        models = (PreparedModel(student), PreparedModel(teacher))
        told = {"data": str(data), **(origin or {})}
        run = started(models, listed, config, accelerator, names, told, resume=resume)
        return run.train()
    except (ConfigError, CorruptDataError):
        discard_folder()
        raise
    finally:
        for model, mode in before:
            model.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        student.eval()
        close_log()
        release_folder()


def started(
    models: tuple[PreparedModel, PreparedModel],
    listed: Listed,
    config: DistilConfig,
    accelerator: Accelerator,
    names: tuple[str, str] | None,
    told: Mapping[str, Any],
    *,
    resume: bool,
) -> Run:
    """Everything that can be refused is checked; then the folder of the run is made.

    Raises:
        ConfigError: Something does not fit.
    """
    student, teacher = models
    side = _side(models, config)
    terms = find_terms(student, teacher, config, (side, side))
    numbers = [0]
    if listed.classes is not None:
        with as_config_error():
            numbers = class_numbers(student.net, listed.classes, terms.classes or 0)
    output = Path(config.output).expanduser()
    resume = resume or started_again(output, accelerator)
    least = config.batch_size * accelerator.num_processes
    # A run that goes on keeps the pictures of a step, whatever the number of processes.
    if not resume and len(listed.train) < least:
        raise ConfigError(
            [f"batch_size: must be at most the {len(listed.train)} training pictures over "
             f"{accelerator.num_processes} process(es), got {config.batch_size}"]
        )  # fmt: skip
    folder = run_folder(output, accelerator, "--resume: " if resume else None)
    named = names or (name_of(student.net), name_of(teacher.net))
    words = [f"{accelerator.num_processes} x {accelerator.device}"]
    words += [f"precision {config.precision}", f"{torch.get_num_threads()} threads"]
    words += [f"{len(listed.train):,} pictures to train on, {len(listed.held):,} to measure on"]
    show_start(
        folder,
        accelerator,
        name=f"distillation of {named[0]} by {named[1]}",
        note="",
        what=", ".join(words),
        save=partial(_save_config, config, {"student": named[0], "teacher": named[1], **told}),
        resume=resume,
    )
    return Run(
        *(config, accelerator, folder, student, teacher, terms, listed, numbers, side, named),
        resume,
    )


def _side(models: tuple[PreparedModel, PreparedModel], config: DistilConfig) -> int:
    """Side of the pictures: as asked for, or the larger one of what the models take."""
    if config.size is not None:
        return config.size
    sizes = [model.size for model in models if model.size is not None]
    sizes = sizes or [input_config(models[0].net)["input_size"][1:]]
    if bad := [size for size in sizes if size[0] != size[1]]:
        raise ConfigError(
            [f"size: must be given for a model of {bad[0][0]} x {bad[0][1]} pixels: pictures are "
             "squares, which it then gets resized"]
        )  # fmt: skip
    return int(max(size[0] for size in sizes))


def _save_config(config: DistilConfig, told: Mapping[str, Any], path: Path) -> None:
    """Writes what a run was told, for who reads it and for ``kdfast distill --config``."""
    values = {**told, **plain(config)}
    head = "# Options of a distillation; docs/use/distil.md explains them.\n"
    write_text(path, head + yaml.safe_dump(values, sort_keys=False))
