# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast distill``."""

from __future__ import annotations

import argparse

from kdfast.commandline.models import MODEL_HELP
from kdfast.commandline.parser import Parser

DESCRIPTION = "Trains a student, mostly a pruned model, to do what its teacher does."
EXAMPLES = (
    "kdfast prune --model vit_small_patch16_224 --pretrained --data pictures --out half",
    "kdfast distill --teacher vit_small_patch16_224 --pretrained --student half --data pictures",
    "kdfast distill --teacher my_vit --student my_vit_half --data pictures --labels --epochs 20",
)
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
    "seed": (int, "of the order, crops, split and random weights; 0"),
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
    "shard": (("none", "fsdp"), "fsdp: each of several processes holds a part of the models; none"),
}
TERMS = {
    "logits": "their divergence; 1",
    "embedding": "cosine distance of outputs that are no logits; 1",
    "feature": "distance of the tokens after the blocks; 0.5",
    "attention": "distance of the attention maps; 0.1",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("distill", DESCRIPTION, EXAMPLES)
    made.add_argument("--teacher", required=True, metavar="MODEL", help=MODEL_HELP)
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
