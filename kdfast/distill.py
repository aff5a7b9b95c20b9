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

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # OpenMP reads this when torch is loaded, and its default, spinning, makes a step ten times
    # slower as soon as another process wants one of the cores (docs/use/training.md).
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

EXAMPLES = """examples:
  kdfast prune --model vit_small_patch16_224 --pretrained \\
      --data pictures --out vit_small_half
  kdfast distill --teacher vit_small_patch16_224 --pretrained \\
      --student vit_small_half --data pictures

  kdfast distill --teacher my_vit --student my_vit_half \\
      --data pictures --labels --epochs 20 --lr 5e-5
"""
# Flags whose values are options of kdfast.distil, and what they mean.
NUMBERS = {
    "epochs": (int, "passes over the training pictures; 10 if left out"),
    "batch_size": (int, "pictures of a step and process; 16"),
    "lr": (float, "peak learning rate of AdamW; 1e-4"),
    "weight_decay": (float, "0.01"),
    "warmup": (float, "part of the run in which the learning rate rises; 0.1"),
    "clip": (float, "largest norm of the gradient; 1"),
    "temperature": (float, "of the logits' divergence; 2"),
    "alpha": (float, "weight of the distillation beside the labels; 0.7"),
    "relation_heads": (int, "compare relations of so many heads, of related models"),
    "size": (int, "side of the pictures; what the models are made for"),
    "val_fraction": (float, "part of the pictures to measure on; 0.1"),
    "limit": (int, "train on so many pictures at most"),
    "memory": (float, "GiB that the resized pictures may take; 1.5"),
    "workers": (int, "processes that load pictures; 0"),
    "seed": (int, "of the order, the crops and the split; 0"),
    "max_steps": (int, "stop and save after so many steps"),
    "save_every": (int, "steps between checkpoints; 500"),
    "log_every": (int, "steps between rows of the log; 10"),
}
WORDS = {
    "attention_kind": (
        ("kl", "reverse_kl", "jsd", "mse", "cosine", "logit_mse"),
        "distance of attention maps; kl",
    ),
    "layers": (("all", "last"), "of related models: the blocks that are compared; all"),
    "precision": (("fp32", "bf16", "fp16"), "of products; fp32"),
    "device": (("auto", "cuda", "cpu"), "auto"),
}
TERMS = {
    "logits": "their divergence; 1",
    "embedding": "cosine distance of outputs that are no logits; 1",
    "feature": "distance of the tokens after the blocks; 0.5",
    "attention": "distance of the attention maps; 0.1",
}
MODELS = "timm name, torchvision:NAME, hf:FOLDER or a saved model's folder"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="kdfast distill",
        description="Trains a student, mostly a pruned model, to do what its teacher does.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--teacher", required=True, metavar="MODEL", help=MODELS)
    made.add_argument("--student", required=True, metavar="MODEL", help="the same; is trained")
    made.add_argument("--teacher-checkpoint", metavar="FILE", help="weights of --teacher")
    made.add_argument("--student-checkpoint", metavar="FILE", help="weights of --student")
    made.add_argument(
        "--pretrained", action="store_true", help="download weights of models that are named"
    )
    made.add_argument("--data", required=True, help="folder or .tar of pictures at any depth")
    made.add_argument("--labels", action="store_true", help="its folders are classes: learn them")
    made.add_argument(
        "--out", "--output", metavar="FOLDER", help="folder of the run; runs/distil if left out"
    )
    made.add_argument("--resume", action="store_true", help="go on with the newest run of --out")
    terms = made.add_argument_group(
        "weights of the terms",
        "0 leaves one out. What cannot be compared is left out with a word about it,\n"
        "but what is named here is an error then.",
    )
    for name, text in TERMS.items():
        terms.add_argument(f"--{name}", type=float, metavar="W", help=text)
    more = made.add_argument_group("training")
    for name, (kind, text) in NUMBERS.items():
        more.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    for name, (choices, text) in WORDS.items():
        more.add_argument(f"--{name.replace('_', '-')}", choices=choices, help=text)
    more.add_argument("--no-augment", action="store_true", help="no random crops and colours")
    more.add_argument("--no-accelerate", action="store_true", help="leave the models as they are")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Distil.

    Args:
        argv: Command line without the program; that of the process if None.

    Returns:
        0; 1 if the training broke or a file could not be written; 2 if a model, the data, an
        option or a checkpoint cannot be used; 128 plus the signal if one came: what was saved
        stays.
    """
    args = parser().parse_args(argv)
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
    from kdfast.configs.distil import distil_config
    from kdfast.distillation.start import distil

    options = options_of(args)
    distil_config(options)  # before models are built
    teacher = model_of(args, "teacher")
    student = model_of(args, "student")
    fit_classes(student, teacher, args.student)
    return distil(
        student,
        teacher,
        args.data,
        resume=args.resume,
        names=(args.student, args.teacher),
        **options,
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``kdfast.distil`` that the command line names."""
    names = (*NUMBERS, *WORDS, *TERMS)
    found = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.out is not None:
        found["output"] = args.out
    return {
        **found,
        "labels": args.labels,
        "augment": not args.no_augment,
        "accelerate": not args.no_accelerate,
    }


def model_of(args: argparse.Namespace, which: str) -> Any:
    """The model that an option names.

    Raises:
        SourceError: There is none, or its weights do not fit.
    """
    from pathlib import Path

    from kdfast.sources import SourceError, is_random, load_model

    name, checkpoint = getattr(args, which), getattr(args, f"{which}_checkpoint")
    pretrained = args.pretrained and checkpoint is None and is_random(name)
    try:
        model = load_model(name, checkpoint, pretrained=pretrained)
    except SourceError as error:
        text = str(error).replace("--model", f"--{which}")
        raise SourceError(text.replace("--checkpoint", f"--{which}-checkpoint")) from error
    if is_random(name, checkpoint, pretrained=pretrained) and not Path(name).is_dir():
        print(f"note: the {which} has random weights; --pretrained or a checkpoint brings others")
    return model


def fit_classes(student: Any, teacher: Any, name: str) -> None:
    """Gives a student that timm built by its name the teacher's number of classes."""
    from pathlib import Path

    mine, theirs = (getattr(model, "num_classes", None) for model in (student, teacher))
    named = not Path(name).is_dir() and hasattr(student, "reset_classifier")
    if named and theirs and mine != theirs:
        student.reset_classifier(theirs)
        print(f"note: the student's classifier starts anew, with the teacher's {theirs} classes")


if __name__ == "__main__":
    sys.exit(main())
