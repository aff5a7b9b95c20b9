# SPDX-License-Identifier: Apache-2.0
"""``python -m kdfast.distill``: trains a pruned model to do what its original does.

See docs/use/distil.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from kdfast.commandline.distill import MODELS, NUMBERS, REQUIRED, TERMS, WORDS, parse

if __name__ == "__main__":
    # OpenMP reads this when torch is loaded, and its default, spinning, makes a step ten times
    # slower as soon as another process wants one of the cores (docs/use/training.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main(argv: Sequence[str] | None = None) -> int:
    """Distil.

    Args:
        argv: Command line without the program; that of the process if None.

    Returns:
        0; 1 if the training broke or a file could not be written; 2 if a model, the data, an
        option or a checkpoint cannot be used; 128 plus the signal if one came: what was saved
        stays.
    """
    args = parse(argv)
    from kdfast.machine.signals import run_command

    return run_command(lambda: guarded(args), "what was done is saved, go on with --resume")


def guarded(args: argparse.Namespace) -> int:
    """The command after its command line: errors that a user can mend are one line."""
    import torch.distributed as dist

    from kdfast.configs.fields import ConfigError
    from kdfast.data.files import CorruptDataError
    from kdfast.sources import SourceError
    from kdfast.trainer.loop import NonFiniteLoss

    try:
        run(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except ConfigError as error:
        lines = [f"--{flagged(line)}" for line in error.problems]
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        return 2
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CorruptDataError, NonFiniteLoss, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def flagged(problem: str) -> str:
    """A problem of an option by its flag."""
    name, colon, rest = problem.partition(":")
    return f"{name.replace('_', '-')}{colon}{rest}".removeprefix("--")


def run(args: argparse.Namespace) -> Any:
    """Everything that ``main`` does after the command line; raises instead of printing."""
    import torch

    from kdfast.configs.distil import distil_config
    from kdfast.distillation.start import distil

    options = options_of(args)
    config = distil_config(options)  # before models are built
    # Random weights are those of ``kdfast prune`` with this seed, and of the run to resume.
    torch.manual_seed(config.seed)
    teacher = model_of(args, "teacher")
    student = model_of(args, "student")
    fit_classes(student, teacher, args.student)
    return distil(
        student,
        teacher,
        args.data,
        resume=args.resume,
        names=(args.student, args.teacher),
        origin={name: value for name in MODELS if (value := getattr(args, name))},
        **options,
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``kdfast.distil``: those of ``--config``, and what was given replaces them.

    ``args`` gets the models and the data of the config where it names none.

    Raises:
        ConfigError: The file cannot be read, or a model or the data are named nowhere.
    """
    from kdfast.configs.fields import ConfigError

    saved = {} if args.config is None else saved_options(args.config, resume=args.resume)
    take_models(args, saved)
    if missing := [name for name in REQUIRED if getattr(args, name) is None]:
        raise ConfigError([f"{name}: must be given" for name in missing])
    names = (*NUMBERS, *WORDS, *TERMS)
    found = saved | {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.out is not None:
        found["output"] = args.out
    for name, given, value in (
        ("labels", args.labels, True),
        ("augment", args.no_augment, False),
        ("accelerate", args.no_accelerate, False),
    ):
        if given:
            found[name] = value
    return found


def take_models(args: argparse.Namespace, saved: dict[str, Any]) -> None:
    """Moves models and data from the saved options to ``args``, where it names none."""
    told = {name: saved.pop(name, None) for name in MODELS}
    for which in ("teacher", "student"):
        if getattr(args, which) is not None:
            told[f"{which}_checkpoint"] = None  # of the model that was named there
    for name, value in told.items():
        setattr(args, name, getattr(args, name) or value)


def saved_options(path: str, *, resume: bool) -> dict[str, Any]:
    """What a run was told, as its ``config.yaml`` has it.

    Args:
        path: The file.
        resume: Whether the run in whose folder it is goes on, there and to its end.

    Raises:
        ConfigError: It cannot be read, or is of another command.
    """
    from kdfast.configs.fields import ConfigError
    from kdfast.configs.yaml_file import read_tree
    from kdfast.trainer.runs import own_output

    found = read_tree(path)
    if "name" in found or "student" not in found:
        raise ConfigError([f"config: {path} is that of another run; try kdfast train --config"])
    own = own_output(path) if resume else None
    return found if own is None else {**found, "output": own, "max_steps": None}


def model_of(args: argparse.Namespace, which: str) -> Any:
    """The model that an option names.

    Raises:
        SourceError: There is none, or its weights do not fit.
    """
    from kdfast.sources import is_random, load_model

    name, checkpoint = getattr(args, which), getattr(args, f"{which}_checkpoint")
    # It is for the models that are named; a saved one has its weights.
    pretrained = args.pretrained and is_random(name, checkpoint)
    model = load_model(
        *(name, checkpoint, pretrained), flag=f"--{which}", weights_flag=f"--{which}-checkpoint"
    )
    if is_random(name, checkpoint, pretrained=pretrained):
        print(f"note: the {which} has random weights; --pretrained or a checkpoint brings others")
    return model


def fit_classes(student: Any, teacher: Any, name: str) -> None:
    """Gives a student that is named, not saved, the teacher's number of classes."""
    from kdfast.resolve import class_count, is_saved, with_classes

    wanted = class_count(teacher)
    if wanted and wanted != class_count(student) and not is_saved(name):
        with_classes(student, wanted, f"--student: {name}")
        print(f"note: the student's classifier starts anew, with the teacher's {wanted} classes")


if __name__ == "__main__":
    sys.exit(main())
