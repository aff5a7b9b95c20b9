# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast distill``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from kdfast.commandline.models import MODEL_HELP
from kdfast.commandline.parser import Parser
from kdfast.configs.distil import WEIGHTS, DistilConfig
from kdfast.configs.fields import defaults_of, hints

DESCRIPTION = "Trains a student, mostly a pruned model, to do what its teacher does."
EXAMPLES = (
    "kdfast prune --model vit_small_patch16_224 --pretrained --data pictures --out half",
    "kdfast distill --teacher vit_small_patch16_224 --pretrained --student half --data pictures",
    "kdfast distill --teacher my_vit --student my_vit_half --data pictures --labels --epochs 20",
)
# What a run is about, beside the options.
REQUIRED = ("teacher", "student", "data")
MODELS = (*REQUIRED, "teacher_checkpoint", "student_checkpoint", "pretrained")
# Flags whose values are options of kdfast.distil, and what they mean.
NUMBERS = {
    "epochs": (int, "passes over the training pictures"),
    "batch_size": (int, "pictures of a step and process"),
    "lr": (float, "peak learning rate of AdamW"),
    "weight_decay": (float, "of AdamW"),
    "warmup": (float, "part of the run in which the learning rate rises"),
    "clip": (float, "largest norm of the gradient"),
    "temperature": (float, "of the logits' divergence"),
    "alpha": (float, "weight of the distillation beside the labels"),
    "relation_heads": (int, "compare relations of so many heads, of related models"),
    "size": (int, "side of the pictures [what the models are made for]"),
    "val_fraction": (float, "part of the pictures to measure on"),
    "limit": (int, "train on so many pictures at most"),
    "memory": (float, "GiB that the resized pictures may take"),
    "workers": (int, "processes that load pictures"),
    "seed": (int, "of the order, crops, split and random weights"),
    "max_steps": (int, "stop and save after so many steps"),
    "save_every": (int, "steps between checkpoints"),
    "log_every": (int, "steps between rows of the log"),
}
WORDS = {
    "attention_kind": "distance of attention maps",
    "layers": "of related models: the blocks that are compared",
    "precision": "of products",
    "device": "to train on",
}
TERMS = {
    "logits": "their divergence",
    "embedding": "cosine distance of outputs that are no logits",
    "feature": "distance of the tokens after the blocks",
    "attention": "distance of the attention maps",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("distill", DESCRIPTION, EXAMPLES)
    made.add_argument("--teacher", metavar="MODEL", help=MODEL_HELP)
    made.add_argument("--student", metavar="MODEL", help="the same; is trained")
    made.add_argument("--teacher-checkpoint", metavar="FILE", help="weights of --teacher")
    made.add_argument("--student-checkpoint", metavar="FILE", help="weights of --student")
    made.add_argument(
        "--pretrained", action="store_true", help="download weights of models that are named"
    )
    made.add_argument("--data", metavar="PATH", help="folder or .tar of pictures at any depth")
    made.add_argument("--labels", action="store_true", help="its folders are classes: learn them")
    made.add_argument("--out", "--output", metavar="FOLDER", help="folder of the run [runs/distil]")
    made.add_argument("--resume", action="store_true", help="go on with the newest run of --out")
    made.add_argument(
        "--config", metavar="FILE", help="config.yaml of a run: what is not given is as there"
    )
    terms = made.add_argument_group(
        "weights of the terms",
        "0 leaves one out. What cannot be compared is left out with a word about it,\n"
        "but what is named here is an error then.",
    )
    for name, text in TERMS.items():
        about = f"{text} [{WEIGHTS[name]:g}]"
        terms.add_argument(f"--{name}", type=float, metavar="W", help=about)
    more = made.add_argument_group("training")
    usual, kinds = defaults_of(DistilConfig), hints(DistilConfig)
    for name, (kind, text) in NUMBERS.items():
        about = text if usual[name] is None else f"{text} [{usual[name]:g}]"
        more.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=about)
    for name, text in WORDS.items():
        known = get_args(kinds[name])
        about = f"{text}: {', '.join(known)} [{usual[name]}]"
        flag = f"--{name.replace('_', '-')}"
        more.add_argument(flag, choices=known, metavar="NAME", help=about)
    more.add_argument("--no-augment", action="store_true", help="no random crops and colours")
    more.add_argument("--no-accelerate", action="store_true", help="leave the models as they are")
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; without a config a run needs both models and the data."""
    made = parser()
    args = made.parse_args(argv)
    missing = [f"--{name}" for name in REQUIRED if getattr(args, name) is None]
    if missing and args.config is None:
        made.error(f"{', '.join(missing)}: must be given, or --config with a run's config.yaml")
    return args
