# SPDX-License-Identifier: Apache-2.0
"""The links of a chain: what they are, how they are built, and how checkpoints are verified."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdfast.configs.chain import INITS, ChainConfig, per_link, roles
from kdfast.configs.fields import ConfigError
from kdfast.data.labelled import Classification
from kdfast.machine.weights import weight_problems
from kdfast.models.prepared import PreparedModel
from kdfast.pruning.architecture import described
from kdfast.resolve import TORCHVISION, SourceError, is_saved, load_model
from kdfast.resolve.link_file import is_link, weights_of
from kdfast.resolve.models import load_state
from kdfast.resolve.state import read_checkpoint, state_of
from kdfast.trainer.commits import check_file, load_checkpoint

# Names of what a link starts from, as folders.
FOLDERS = {"pretrained": "imagenet_pretrained", "scratch": "from_scratch"}


@dataclass(frozen=True)
class Link:
    """One model of a chain.

    Attributes:
        index: Position in the chain.
        role: ``teacher``, ``assistant``, ``student``, or ``student_ce`` for the twin.
        model: A name, as ``kdfast.resolve.load_model`` takes it.
        args: Keyword arguments of the constructor, for a name of timm or torchvision.
        init: ``scratch``, ``pretrained``, or a file.
        epochs: Passes over the training data.
        distilled: Whether the link before it teaches.
    """

    index: int
    role: str
    model: str
    args: dict[str, Any]
    init: str
    epochs: int
    distilled: bool

    @property
    def folder(self) -> str:
        """Name of the folder of this link's kind of start."""
        saved = is_saved(self.model) or self.init not in FOLDERS
        return "from_checkpoint" if saved else FOLDERS[self.init]


def links_of(config: ChainConfig) -> list[Link]:
    """All links of a chain, without the twin."""
    names = roles(len(config.chain))
    return [
        Link(
            index=i,
            role=names[i],
            model=model,
            args=per_link(config.model_args, i) if config.model_args else {},
            init=per_link(config.init, i),
            epochs=per_link(config.epochs, i),
            distilled=i > 0,
        )
        for i, model in enumerate(config.chain)
    ]


class LinkModel(PreparedModel):
    """A model behind its own resize and normalisation."""

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W) in [0, 1], not normalised."""
        output = super().forward(images)
        # Models of Hugging Face return more than the logits.
        logits: Tensor = getattr(output, "logits", output)
        return logits


def build_link(link: Link, classes: int, *, checkpointing: bool = False) -> LinkModel:
    """The model of a link with the weights that it starts from.

    Raises:
        ConfigError: It cannot be built, or the weights cannot be had or do not fit.
    """
    flag = f"chain: {link.role}"
    wanted = link.init == "pretrained" and not is_saved(link.model)
    try:
        net = load_model(
            link.model, pretrained=wanted, flag=flag, classes=classes, **link.args
        ).train()
    except SourceError as error:
        raise ConfigError([str(error)]) from error
    if checkpointing:
        switch_checkpointing(net, link.model)
    model = LinkModel(net)
    if link.init not in INITS:
        start_from(model, Path(link.init).expanduser(), link)
    return model


def described_link(link: Link, model: LinkModel) -> dict[str, Any] | None:
    """What rebuilds a link that no name and arguments of timm do; None where there is no such."""
    if not (is_saved(link.model) or link.model.startswith(TORCHVISION)):
        return None
    try:
        config: dict[str, Any] = json.loads(json.dumps(described(model.net, {})))
    except (TypeError, ValueError):  # a family that has no description: its name is needed then
        return None
    return config


def switch_checkpointing(net: nn.Module, name: str) -> None:
    """Let a model recompute its blocks in the backward.

    Raises:
        ConfigError: It cannot.
    """
    switch: Any = getattr(net, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError([f"checkpointing: {name} does not support it"])
    try:
        switch(True)
    except AssertionError as error:
        raise ConfigError([f"checkpointing: {name}: {error}"]) from error


def start_from(model: LinkModel, path: Path, link: Link) -> None:
    """Load the file that ``init`` names into a new model.

    Only a classifier of another size is left at its random start; anything else must fit.

    Raises:
        ConfigError: The file is damaged, or does not fit the model.
    """
    try:
        check_file(path)
        content = read_checkpoint(path)
        state = state_of(content)
    except (
        *(OSError, KeyError, RuntimeError, ValueError),
        *(AttributeError, TypeError),  # of values that are not what they should be
    ) as error:
        raise ConfigError([f"init: {path} is no checkpoint: {error}"]) from error
    if is_link(content):
        saved = content["meta"]["link"]
        held = (saved.get("model"), saved.get("args"))
        if held != (link.model, link.args):
            raise ConfigError(
                [f"init: {path} must hold {link.model} {link.args}, got {held[0]} {held[1]}"]
            )
    try:
        load_state(model.net, state, str(path))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            [f"init: {path} does not fit {link.model} {link.args}: {error}"]
        ) from error


def facts(link: Link, data: Classification, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint says about its model and its data, and a later link verifies.

    Args:
        link: The model.
        data: The images.
        config: Result of ``described_link``.
    """
    described = {} if config is None else {"config": config}
    return {
        "link": {"role": link.role, "model": link.model, "args": link.args, **described},
        "data": {
            "name": data.name,
            "task": data.task,
            "classes": list(data.class_names),
            "content": data.facts["content"],
        },
    }


def load_teacher(path: Path, link: Link, data: Classification) -> LinkModel:
    """The finished model of the link before, frozen; its checkpoint must be what is expected.

    Args:
        path: Its ``best.pt``.
        link: The link before.
        data: The images of the run.

    Raises:
        ConfigError: There is no such file, or its architecture, classes or data differ.
    """
    if not path.is_file():
        raise ConfigError(
            [f"stage: needs the {link.role}'s checkpoint {path}; train it first: stage={link.role}"]
        )
    try:
        state = load_checkpoint(path)
    except ValueError as error:
        raise ConfigError([f"{link.role}: {error}"]) from error
    saved, mine = _meta(path, link, state), facts(link, data)
    found: list[str] = []
    for group, names in (("link", ("model", "args")), ("data", ("name", "task", "classes"))):
        for name in names:
            have, want = saved[group].get(name), mine[group][name]
            if have != want:
                found.append(f"{link.role}: {path} must have {name} {want!r}, got {have!r}")
    if not found and saved["data"].get("content") != mine["data"]["content"]:
        found.append(
            f"{link.role}: {path} was trained on other images of {data.name} (another split or "
            "version), so its training set may hold this run's validation images"
        )
    if found:
        raise ConfigError(found)
    # The weights come from the file, wherever the link itself started.
    model = build_link(replace(link, init="scratch"), len(data.class_names), checkpointing=False)
    try:
        weights = weights_of(state)
        if problems := weight_problems(weights, model.net.state_dict()):
            raise ValueError("; ".join(problems))
        model.net.load_state_dict(weights)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ConfigError([f"{link.role}: {path} does not fit {link.model}: {error}"]) from error
    return model.requires_grad_(False).eval()


def _meta(path: Path, link: Link, state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    meta = state.get("meta")
    groups = [meta.get(name) for name in ("link", "data")] if isinstance(meta, dict) else [None]
    if not isinstance(meta, dict) or not all(isinstance(group, dict) for group in groups):
        raise ConfigError([f"{link.role}: {path} must be a checkpoint of a chain's link"])
    return meta
