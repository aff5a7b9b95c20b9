# SPDX-License-Identifier: Apache-2.0
"""The flags of ``kdfast train`` that other trainers have too, and the keys that they set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdfast.configs.chain import ChainConfig
from kdfast.configs.folder_kind import chain_kind, is_elsewhere, view_kind
from kdfast.configs.synonyms import Kind


@dataclass(frozen=True)
class Flag:
    """A flag.

    Attributes:
        about: Its help.
        chain: The key that it sets in a chain; with a space: why there is none.
        recovery: The same of a pruning run.
        metavar: Of its value; None: it has none.
        alone: Its value where it is given without one; None: it needs one.
    """

    about: str
    chain: str
    recovery: str
    metavar: str | None = "N"
    alone: str | None = None


FLAGS = {
    "data": Flag("folder or file of your data", "data.root", "data.root", "PATH"),
    "dataset": Flag("its kind: imagefolder, cifar10, pathmnist", "data.kind", "data.kind", "KIND"),
    "output": Flag("folder of the run", "output", "output", "FOLDER"),
    "epochs": Flag("passes over the training data", "epochs", "run.epochs"),
    "batch-size": Flag("images per step", "batch", "run.batch_size"),
    "lr": Flag("peak learning rate", "optim.lr", "optim.lr", "RATE"),
    "warmup-epochs": Flag(
        "epochs of warm-up, of a chain",
        "optim.warmup_epochs",
        "a pruning run counts its warm-up in steps; --set optim.warmup=STEPS",
    ),
    "workers": Flag("loader processes", "data.workers", "data.workers"),
    "precision": Flag("auto, fp32, bf16 or fp16", "precision", "run.precision", "TYPE"),
    "mixed-precision": Flag(
        "bf16, or the type that follows", "precision", "run.precision", "TYPE", "bf16"
    ),
    "pretrained": Flag(
        "start every model of a chain from timm's weights",
        "init",
        "a pruning run starts from a trained teacher; --set teacher.checkpoint=FILE",
        None,
        "pretrained",
    ),
    "stage": Flag(
        "part of a chain: all, teacher, assistant, student",
        "stage",
        "a pruning run has no stages; it prunes and distils in one go",
        "NAME",
    ),
    "seed": Flag("of weights, order and augmentation", "seeds", "seed"),
    "no-deterministic": Flag(
        "let cuDNN take the fastest kernels", "deterministic", "run.deterministic", None, "false"
    ),
}
# Other words for values.
_PRECISIONS = {"no": "fp32", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def is_flag(change: str) -> bool:
    """Whether a change is a flag with its value, as in ``--epochs=3``."""
    return change.startswith("--")


def key_of(name: str, kind: Kind) -> str:
    """The key that a flag sets in a kind of config; with a space: why there is none."""
    flag = FLAGS[name]
    return flag.chain if kind is ChainConfig else flag.recovery


def as_key(change: str, kind: Kind) -> str:
    """What a flag with its value changes, as ``key=value``.

    Args:
        change: ``--flag=value``.
        kind: ``Config`` or ``ChainConfig``.

    Raises:
        ValueError: This kind has no such key; the message names the one that is meant.
    """
    name, _, value = change.removeprefix("--").partition("=")
    key = key_of(name, kind)
    if " " in key:
        raise ValueError(f"--{name}: {key}")
    if key == "seeds":
        value = f"[{value}]"
    if key.endswith("precision"):
        value = _PRECISIONS.get(value, value)
    return f"{key}={value}"


def absent_data(changes: Sequence[str], kind: Kind) -> list[str]:
    """The complaint about labelled data of ``--data`` that are not there."""
    named = _named(changes)
    if kind is not ChainConfig or not named or is_elsewhere(named[-1]):
        return []
    on_hub = {"--dataset=huggingface", "data.kind=huggingface"} & set(changes)
    if on_hub or Path(named[-1]).expanduser().exists():
        return []
    return [f"--data: there is no folder or file {named[-1]}"]


def _named(changes: Sequence[str]) -> list[str]:
    """What ``--data`` names; the last one counts."""
    return [change.partition("=")[2] for change in changes if change.startswith("--data=")]


def data_kind(changes: Sequence[str], kind: Kind) -> list[str]:
    """The kind of what ``--data`` names, as ``data.kind=...``; nothing without the flag."""
    named = _named(changes)
    if not named:
        return []
    found = chain_kind(named[-1]) if kind is ChainConfig else view_kind(named[-1])
    return [] if found is None else [f"data.kind={found}"]
