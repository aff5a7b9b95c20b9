# SPDX-License-Identifier: Apache-2.0
"""What of a student and its teacher is compared, and what cannot be, with the reason.

B batch, C channels or classes, H heads, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.configs.distil import DistilConfig
from kdfast.configs.fields import ConfigError
from kdfast.matching.capture import Reader, reasons
from kdfast.matching.features import FeatureRow, block_rows
from kdfast.matching.layers import (
    Maps,
    Size,
    name_of,
    paired_layers,
    probed,
    read_maps,
    tokens_between,
)
from kdfast.models.prepared import PreparedModel
from kdfast.nn.attention import qualified_name
from kdfast.pruning.observe import frozen_eval, main_output
from kdfast.resolve import class_count


class Unfit(ValueError):
    """A term cannot be formed; the message is the reason."""


class MapPair(NamedTuple):
    """Two attentions whose maps are compared.

    Attributes:
        student: Name in the student.
        teacher: Name in the teacher.
        heads: The teacher's head that each of the student's imitates; None: by groups.
    """

    student: str
    teacher: str
    heads: list[int] | None


class BlockPair(NamedTuple):
    """Two blocks whose outputs are compared."""

    student: FeatureRow
    teacher: FeatureRow


@dataclass
class Terms:
    """What of two models is compared.

    Attributes:
        cut: Whether the student was cut from the teacher: then blocks and heads are those that
            they were.
        why_not_cut: What speaks against that; "" where nothing does.
        untouched: Of the weight matrices that pruning leaves whole, how many are the teacher's,
            bit for bit, and how many there are.
        weights: Of the terms that are formed.
        maps: Of the term "attention".
        blocks: Of the term "feature".
        classes: Number of classes, where the student's outputs are logits.
        comparable: Whether outputs are of one kind and shape.
        left_out: Why terms are not formed that nobody asked for by name.
        notes: Lines for the log.
    """

    cut: bool
    why_not_cut: str
    untouched: tuple[int, int] = (0, 0)
    weights: dict[str, float] = field(default_factory=dict)
    maps: list[MapPair] = field(default_factory=list)
    blocks: list[BlockPair] = field(default_factory=list)
    classes: int | None = None
    comparable: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def kinship(self) -> str:
        """Whether the student was cut from the teacher, and what says so, in words."""
        if not self.cut:
            return f"the student was not cut from the teacher: {self.why_not_cut}"
        same, whole = self.untouched
        if same:
            reason = f"{same} of {whole} whole weights are still the teacher's"
        else:
            reason = "by its structure; no weight is the teacher's any more"
        return (
            f"the student was cut from the teacher ({reason}): blocks and heads meet those they "
            "were"
        )


def find_terms(
    student: PreparedModel, teacher: PreparedModel, config: DistilConfig, size: Size
) -> Terms:
    """Everything that two models can be compared by; they run on one black image.

    Args:
        student: The model that is trained.
        teacher: The model that it imitates.
        config: Weights of the terms.
        size: (height, width) of the pictures to come.

    Raises:
        ConfigError: A term that was asked for by name cannot be formed, or none can; a model does
            not run on such pictures; or labels need logits.
    """
    models = (student, teacher)
    try:
        mine, theirs = (read_maps(model, size) for model in models)
        rows = [block_rows(model.net) for model in models]
        outputs = [_output(model, size) for model in models]
    except ValueError as error:
        raise ConfigError([f"models: {error}"]) from error
    why = why_not_cut(student.net, teacher.net, (mine, theirs), rows)
    terms = Terms(not why, why, (0, 0) if why else untouched(student.net, teacher.net))
    if terms.cut and config.relation_heads is not None:
        raise ConfigError(
            ["relation_heads: the student was cut from the teacher: its heads are compared with "
             "those that they were; leave it out"]
        )  # fmt: skip
    found: dict[str, Callable[[], None]] = {
        "logits": lambda: _logits(terms, *outputs),
        "embedding": lambda: _embedding(*outputs),
        "feature": lambda: _feature(terms, models, rows, config, size),
        "attention": lambda: _attention(terms, models, (mine, theirs), config),
    }
    problems = []
    for term, form in found.items():
        weight = config.weight(term)
        if not weight:
            continue
        try:
            form()
            terms.weights[term] = weight
        except Unfit as error:
            if config.asked(term):
                problems.append(f"{term}: cannot be formed: {error}")
            terms.left_out[term] = str(error)
    # One of these two alone says something about such outputs.
    either = outputs[0].logits or outputs[1].logits
    terms.left_out.pop("embedding" if either else "logits", None)
    terms.comparable = outputs[0] == outputs[1]
    if outputs[0].logits:
        terms.classes = outputs[0].width
    if config.labels and not outputs[0].logits:
        problems.append("labels: need a student with a classifier; its output is an embedding")
    if not problems and not terms.weights and not config.labels:
        reasons_ = "; ".join(f"{term}: {reason}" for term, reason in terms.left_out.items())
        problems.append(f"models: must have something to compare, got none ({reasons_})")
    if problems:
        raise ConfigError(problems)
    return terms


def why_not_cut(
    student: nn.Module,
    teacher: nn.Module,
    maps: tuple[Maps, Maps],
    rows: list[dict[str, FeatureRow]],
) -> str:
    """What speaks against that the student was cut from the teacher; "" where nothing does."""
    kinds = [qualified_name(net) for net in (student, teacher)]
    if kinds[0] != kinds[1]:
        return f"a {_short(kinds[0])} and a {_short(kinds[1])}"
    if list(rows[0]) != list(rows[1]):
        return f"{len(rows[0])} blocks and {len(rows[1])}"
    for name, row in rows[0].items():
        if row.width != rows[1][name].width:
            return f"{name} is {row.width} and {rows[1][name].width} channels wide"
    mine, theirs = maps
    for name, call in mine.calls.items():
        if name not in theirs.every:
            return f"the teacher has no {name}"
        if name not in theirs.calls:
            continue
        other = theirs.calls[name]
        if call.q.shape[3] != other.q.shape[3]:
            return f"heads of {name} are {call.q.shape[3]} and {other.q.shape[3]} channels wide"
        if missing := sorted(set(_heads(mine, name)) - set(_heads(theirs, name))):
            return f"the teacher's {name} has no heads {missing}"
    return ""


def untouched(student: nn.Module, teacher: nn.Module) -> tuple[int, int]:
    """How many weights of two or more dimensions are equal in both, of those of one shape.

    Structure alone does not tell a copy from a model that was built alike; equal weights do.
    """
    theirs = teacher.state_dict()
    both = [
        (tensor, theirs[name])
        for name, tensor in student.state_dict().items()
        if tensor.ndim > 1 and name in theirs and theirs[name].shape == tensor.shape
    ]
    return sum(a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()) for a, b in both), len(both)


class _Output(NamedTuple):
    """What a model returns for one picture.

    Attributes:
        shape: Without the batch, channels first.
        logits: Whether it is a score for each class.
    """

    shape: tuple[int, ...]
    logits: bool

    @property
    def width(self) -> int:
        return self.shape[0]

    def __str__(self) -> str:
        if self.logits:
            return f"{self.width} classes"
        return f"an embedding of {' x '.join(map(str, self.shape))}"


def _output(model: PreparedModel, size: Size) -> _Output:
    """Raises ValueError where the output is no tensor (B, C, ...)."""
    image = torch.zeros(1, 3, *size, dtype=model.mean.dtype, device=model.mean.device)
    with torch.no_grad(), frozen_eval(model):
        given = model(image)
    made = main_output(given)
    if not isinstance(made, Tensor) or made.dim() < 2:
        got = type(given).__name__
        raise ValueError(f"{name_of(model.net)} must return (B, C, ...), got {got}")
    return _Output(tuple(made.shape[1:]), _are_logits(model.net, given, made))


def _are_logits(net: Any, given: Any, made: Tensor) -> bool:
    if made.dim() != 2:
        return False
    if isinstance(given, Mapping):
        return "logits" in given
    return class_count(net) == made.shape[1]


def _logits(terms: Terms, mine: _Output, theirs: _Output) -> None:
    if not (mine.logits and theirs.logits):
        which = "student" if not mine.logits else "teacher"
        raise Unfit(f"the {which} returns {theirs if mine.logits else mine}, which are no logits")
    if mine.shape != theirs.shape:
        raise Unfit(f"the student has {mine}, the teacher {theirs}")


def _embedding(mine: _Output, theirs: _Output) -> None:
    if mine.logits and theirs.logits:
        raise Unfit("both models return logits")
    if mine.shape != theirs.shape:
        raise Unfit(f"the student returns {mine}, the teacher {theirs}")


def _feature(
    terms: Terms,
    models: tuple[PreparedModel, PreparedModel],
    rows: list[dict[str, FeatureRow]],
    config: DistilConfig,
    size: Size,
) -> None:
    mine, theirs = (list(some.values()) for some in rows)
    for model, some in zip(models, (mine, theirs), strict=True):
        if not some:
            raise Unfit(f"{name_of(model.net)} has no blocks that are known")
    layers = "all" if terms.cut else config.layers
    chosen = paired_layers(len(mine), len(theirs), layers)
    pairs = [BlockPair(mine[i], theirs[j]) for i, j in chosen]
    shapes = []
    for model, named, at in zip(models, rows, (0, 1), strict=True):
        names = [pair[at].module for pair in pairs]
        try:
            seen = probed(model, size, [], names, named).features
        except ValueError as error:
            raise Unfit(str(error)) from error
        shapes.append([tuple(seen[name].shape[1:]) for name in names])
    for pair, have, want in zip(pairs, *shapes, strict=True):
        if have != want:
            raise Unfit(
                f"{pair.student.module} of the student gives {have[0]} tokens of {have[1]} "
                f"channels, {pair.teacher.module} of the teacher {want[0]} of {want[1]}"
            )
    terms.blocks = pairs
    terms.notes.append(f"feature: the tokens after {len(pairs)} of {len(mine)} blocks")


def _attention(
    terms: Terms,
    models: tuple[PreparedModel, PreparedModel],
    maps: tuple[Maps, Maps],
    config: DistilConfig,
) -> None:
    for model, (calls, every) in zip(models, maps, strict=True):
        if not calls:
            name, why = name_of(model.net), reasons(model.net, every)
            raise Unfit(f"{name} must have attention maps that can be read, {why}")
    mine, theirs = maps
    pairs = _cut_pairs(mine, theirs) if terms.cut else _paired(mine, theirs, config)
    for pair in pairs:
        call, other = mine.calls[pair.student], theirs.calls[pair.teacher]
        have = tokens_between(models[0].net, pair.student, call)
        want = tokens_between(models[1].net, pair.teacher, other)
        if have != want:
            raise Unfit(
                f"{pair.student} of the student attends among {have}, {pair.teacher} of the "
                f"teacher among {want}"
            )
        _check_relation(pair, call, other, config.relation_heads)
    if not pairs:
        raise Unfit("no attention of the student is one of the teacher's that can be read")
    terms.maps = pairs
    terms.notes.append(_described(terms, models, maps, config))


def _cut_pairs(mine: Maps, theirs: Maps) -> list[MapPair]:
    """Every attention with itself, and every head with the one that it was."""
    pairs = []
    for name, call in mine.calls.items():
        if name not in theirs.calls:
            continue
        kept, held = _heads(mine, name), _heads(theirs, name)
        # Attentions that subtract two softmaxes have two maps for a head, side by side.
        each = call.q.shape[1] // len(kept)
        heads = [held.index(head) * each + i for head in kept for i in range(each)]
        pairs.append(MapPair(name, name, heads))
    return pairs


def _paired(mine: Maps, theirs: Maps, config: DistilConfig) -> list[MapPair]:
    a, b = list(mine.calls), list(theirs.calls)
    return [MapPair(a[i], b[j], None) for i, j in paired_layers(len(a), len(b), config.layers)]


def _check_relation(pair: MapPair, call: Any, other: Any, count: int | None) -> None:
    if count is None:
        return
    for name, some in ((pair.student, call), (pair.teacher, other)):
        width = some.q.shape[1] * some.q.shape[3]
        if some.bias is not None:
            raise Unfit(f"{name} adds a position bias to each head, which no relation has")
        if width % count:
            raise Unfit(f"relation_heads must divide the width {width} of {name}, got {count}")


def _described(
    terms: Terms,
    models: tuple[PreparedModel, PreparedModel],
    maps: tuple[Maps, Maps],
    config: DistilConfig,
) -> str:
    """What is compared, in words."""
    count = len(maps[0].every)
    if terms.cut:
        words = f"{sum(len(pair.heads or ()) for pair in terms.maps)} heads with those they were"
    elif config.relation_heads is not None:
        words = f"relations of {config.relation_heads} heads"
    else:
        words = "heads by groups"
    rest = reasons(models[0].net, maps[0].every)
    rest = f", {rest}" if rest.startswith("but") else ""
    return f"attention: {words}, in {len(terms.maps)} of {count} attentions{rest}"


def _heads(maps: Maps, name: str) -> list[int]:
    reader: Reader | str = maps.every[name]
    assert not isinstance(reader, str)  # it was called
    return list(reader.heads)


def _short(kind: str) -> str:
    return kind.rpartition(".")[2]
