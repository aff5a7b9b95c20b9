# SPDX-License-Identifier: Apache-2.0
"""How important every attention head or hidden unit is. See docs/use/pruning.md.

B batch, H heads, N tokens, D head dim, C channels.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdfast.machine.files import write_text
from kdfast.pruning.adapter import Adapter, HeadWeights, Site
from kdfast.pruning.calibration import Calibration
from kdfast.pruning.evaluate import Metric, SelectionObserver, leave_one_out
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.heat_map import draw_head_scores, head_score_figure
from kdfast.pruning.observe import (
    ContextObserver,
    EntropyObserver,
    Observer,
    observe,
)
from kdfast.pruning.reconstruction import calibrated, reconstruction_scores
from kdfast.pruning.score_text import score_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("magnitude", "gradient", "taylor", "entropy", "leave_one_out", "reconstruction")
MLP_METHODS = ("magnitude", "gradient", "taylor", "reconstruction")
FORMAT = "kdfast.head_scores/1"


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Importance of every head, or hidden unit, of a model; higher is more important.

    Prints as a table. ``scores[block]`` is the row of a block, ``len(scores)`` the number of
    blocks.

    Attributes:
        scores: (H,) fp64 per block, by the head's position in the scored model; a block without
            heads has an empty row.
        method: Method of ``head_scores`` or ``mlp_scores``, or "gate" for ``HeadGates``.
        metadata: JSON values: options, model, original head indices, batches and images seen;
            "groups" where heads can only go in groups, their size per block; "choices" for
            "reconstruction" of few heads, the best positions by their number, per block.
    """

    scores: list[Tensor]
    method: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("HeadScores: scores must have at least one block, got none")
        for block, row in enumerate(self.scores):
            if row.dtype != torch.float64:
                raise TypeError(f"HeadScores: block {block} must be float64, got {row.dtype}")
            if row.dim() != 1:
                raise ValueError(f"HeadScores: block {block} must be (H,), got {tuple(row.shape)}")
            if not torch.isfinite(row).all():
                raise ValueError(
                    f"HeadScores: {self.method} scores of block {block} must be finite, "
                    f"got {row.tolist()}"
                )

    @property
    def part(self) -> str:
        """What has the scores: "head" or "unit"."""
        return "unit" if self.metadata.get("part") == "mlp" else "head"

    def __repr__(self) -> str:
        seen = self.metadata.get("images")
        images = "" if seen is None else f", {seen} image{'s' * (seen != 1)}"
        title = f"{self.part} scores: {self.method}{images}; higher is more important"
        return score_text(title, self.part, self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, block: int) -> Tensor:
        return self.scores[block]

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        kept: Sequence[Sequence[int]] | None = None,
    ) -> "Figure":
        """A heat map, blocks by heads; a notebook shows it.

        Args:
            path: Write it to this file too; None: only return it.
            kept: Positions per block, as from ``select_heads``: the others are crossed out.

        Returns:
            The figure of matplotlib.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: ``kept`` has another number of blocks.
        """
        if path is not None:
            draw_head_scores(self, kept, Path(path))
        return head_score_figure(self, kept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; ``load`` restores every bit of the scores."""
        content = {
            "format": FORMAT,
            "method": self.method,
            "metadata": self.metadata,
            "scores": [row.tolist() for row in self.scores],
        }
        content["sha256"] = _digest(content)
        write_text(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadScores":
        """Reads what ``save`` wrote.

        Raises:
            ValueError: The file is not JSON of this format, or the scores are not finite numbers.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"HeadScores: {path} must be JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            got = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"HeadScores: {path} must have format {FORMAT!r}, got {got!r}")
        try:
            rows = [torch.tensor(row, dtype=torch.float64) for row in content["scores"]]
            scores = cls(rows, content["method"], content["metadata"])
            if content.get("sha256", digest := _digest(content)) != digest:
                raise ValueError("not what was saved; remove sha256 from an edited file")
            return scores
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"HeadScores: {path} is damaged: {error}") from error


def _digest(content: dict[str, Any]) -> str:
    # As it is read again: keys that are no text become text.
    read = json.loads(json.dumps(content))
    rest = {name: value for name, value in read.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def head_scores(
    model: nn.Module,
    method: str = "magnitude",
    data: Iterable[Any] | Calibration | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Metric | None = None,
    batches: int | None = None,
    important: str = "low",
    unit: str = "share",
    seed: int = 0,
    progress: bool = True,
) -> HeadScores:
    """Scores every attention head of a model.

    "magnitude" looks at the weights only: ``sqrt(||W_o [W_v b_v]||_F * ||[W_q b_q]^T W_k||_F)`` of
    the head's slices. The others run the model on ``data``, in eval mode, and average over tokens,
    then images. With c the head's context at the input of the output projection, D channels of one
    token, and g the gradient of an image's loss there: "taylor" is ``|c . g|``, the first-order
    change of the loss if the head is removed at that token; "gradient" is ``||g||``. "entropy" is
    the exact entropy of the attention rows, padded keys included. "leave_one_out" is how much the
    metric drops when that head alone is silenced: one partial forward per head. "reconstruction"
    is the error that the head's removal adds to the stream after the best compensation by the heads
    that stay, as a share of the stream's variance.

    Args:
        model: A model of a family in docs/use/pruning.md, already pruned or not.
        method: "magnitude", "gradient", "taylor", "entropy", "leave_one_out" or "reconstruction".
        data: One batch, or an iterable of them. A batch is a tensor of images (B, 3, H, W) or a
            dict with them under "image" or with arguments of the model by name; in an iterable
            also a tuple or list that starts with one of these; see docs. Tensors are moved to the
            model's device. None for "magnitude"; a ``Calibration`` in place of batches for
            "reconstruction".
        loss: ``loss(model output, batch)``, a scalar that is the mean over the batch's images. For
            "gradient" and "taylor" only. None: a random projection of the output, see docs.
        metric: ``metric(model output, batch)``, the mean over the batch's images, higher is
            better. For "leave_one_out" only. None: minus the relative change of the output.
        batches: Use at most so many of all processes; None: all.
        important: For "entropy", which heads score high: "low" (focused) or "high" (spread).
        unit: For "entropy": "share" of the largest possible value, or "nats".
        seed: Seed of the random projection.
        progress: Show a progress bar on a terminal.

    Returns:
        Scores in [0, inf), higher is more important; for "entropy" with "low" the distance to the
        largest entropy, which is KL(attention || uniform). Those of "leave_one_out" with a metric
        are negative where the model is better without the head.

    Raises:
        TypeError: The model's family is not known, or a batch, a loss or a metric is of another
            kind.
        ValueError: An option is unknown or does not belong to the method, there is no batch, or a
            loss or a score is not finite.
        PeerError: Another process failed.

    Where ``torch.distributed`` is initialised all processes call this, each with its share of the
    data, and get the same scores; see docs.

    The model is left as it was: training modes, ``requires_grad``, ``grad`` and hooks, also when
    an error is raised.
    """
    anatomy = anatomy_of("head_scores", model)
    _check_method("head_scores", method, METHODS)
    _check_options(method, loss, metric, batches, important, unit)
    adapter, sites = anatomy.adapter, anatomy.attentions
    metadata: dict[str, Any] = {"model": adapter.family, "heads": [site.held for site in sites]}
    if any(site.group > 1 for site in sites):
        metadata["groups"] = [site.group for site in sites]
    given = _needed("head_scores", method, data)
    if given is None:
        return HeadScores(_magnitude(adapter, sites), method, metadata)
    if method == "reconstruction":
        known = calibrated("head_scores", anatomy, given, batches, progress)
        scores, choices = reconstruction_scores(sites, known.attentions, progress)
        return HeadScores(scores, method, {**metadata, **choices, **known.metadata})
    observer: Observer
    if method == "leave_one_out":
        metadata["metric"] = _name(metric) if metric else "minus relative change of the output"
        observer = SelectionObserver(anatomy, leave_one_out(sites), metric, progress)
        (values,), seen = observe("head_scores", anatomy, observer, given, batches, progress)
        return HeadScores(_drops(values, sites), method, {**metadata, **seen})
    if method == "entropy":
        observer = EntropyObserver(anatomy, important, unit)
        metadata.update(important=important, unit=unit)
    else:
        observer = ContextObserver(sites, model, method, loss, seed)
        metadata["loss"] = _name(loss) if loss else f"random projection, seed {seed}"
    scores, seen = observe("head_scores", anatomy, observer, given, batches, progress)
    return HeadScores(scores, method, {**metadata, **seen})


def mlp_scores(
    model: nn.Module,
    method: str = "magnitude",
    data: Iterable[Any] | Calibration | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HeadScores:
    """Scores every hidden unit of a model's MLPs, for ``select_heads`` and ``prune_heads(mlp=)``.

    A unit is one channel of the input of the MLP's last projection. "magnitude" is the geometric
    mean of the norms of its rows, with their biases, its norm weight and its column. "taylor",
    "gradient" and "reconstruction" are those of ``head_scores`` with a unit in place of a head.

    Args:
        model: A model of a family whose MLPs can be pruned, see docs/use/pruning.md.
        method: "magnitude", "gradient", "taylor" or "reconstruction".
        data: As in ``head_scores``.
        loss: As in ``head_scores``.
        batches: As in ``head_scores``.
        seed: Seed of the random projection.
        progress: Show a progress bar on a terminal.

    Returns:
        Scores in [0, inf), one per hidden unit, higher is more important.

    Raises:
        TypeError: As ``head_scores``.
        ValueError: As ``head_scores``, or the model has no MLP that can be pruned.
    """
    anatomy = anatomy_of("mlp_scores", model)
    _check_method("mlp_scores", method, MLP_METHODS)
    if loss is not None and method not in ("gradient", "taylor"):
        raise ValueError(f"mlp_scores: loss must be None for {method!r}, which has no gradient")
    adapter, sites = anatomy.adapter, anatomy.mlps
    if not sites:
        raise ValueError(f"mlp_scores: no MLP of this {adapter.family} can be pruned")
    metadata: dict[str, Any] = {"model": adapter.family, "part": "mlp"}
    given = _needed("mlp_scores", method, data)
    if given is None:
        return HeadScores([_unit_magnitudes(site).cpu() for site in sites], method, metadata)
    if method == "reconstruction":
        known = calibrated("mlp_scores", anatomy, given, batches, progress)
        if not known.mlps:
            raise ValueError("mlp_scores: the calibration must have hidden units, got mlps=False")
        rows, _ = reconstruction_scores(sites, known.mlps, progress)
        return HeadScores(rows, method, {**metadata, **known.metadata})
    observer = ContextObserver(sites, model, method, loss, seed)
    metadata["loss"] = _name(loss) if loss else f"random projection, seed {seed}"
    scores, seen = observe("mlp_scores", anatomy, observer, given, batches, progress)
    return HeadScores(scores, method, {**metadata, **seen})


def _check_method(function: str, method: object, known: Sequence[str]) -> None:
    """Raises unless it is the name of a method.

    Raises:
        TypeError: It is no text, such as the data in its place.
        ValueError: There is no such method.
    """
    if not isinstance(method, str):
        raise TypeError(
            f"{function}: method must be one of {tuple(known)}, got {type(method).__name__}; data "
            f"come after it: {function}(model, 'taylor', data)"
        )
    if method not in known:
        near = difflib.get_close_matches(method, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{function}: method must be one of {tuple(known)}, got {method!r}{hint}")


def _needed(function: str, method: str, data: Iterable[Any] | Calibration | None) -> Any:
    if method == "magnitude" and data is not None:
        raise ValueError(
            f"{function}: data must be None for 'magnitude', which reads no images; to use them "
            "name another method, such as 'taylor'"
        )
    if method != "magnitude" and data is None:
        raise ValueError(f"{function}: data must be given for {method!r}, got None")
    if isinstance(data, Calibration) and method != "reconstruction":
        raise TypeError(f"{function}: data must be batches for {method!r}, got a Calibration")
    return data


def _check_options(
    method: str, loss: object, metric: object, batches: int | None, important: str, unit: str
) -> None:
    for name, value, known in (
        ("important", important, ("low", "high")),
        ("unit", unit, ("share", "nats")),
    ):
        if value not in known:
            raise ValueError(f"head_scores: {name} must be one of {known}, got {value!r}")
    if loss is not None and method not in ("gradient", "taylor"):
        raise ValueError(f"head_scores: loss must be None for {method!r}, which has no gradient")
    if metric is not None and method != "leave_one_out":
        raise ValueError(f"head_scores: metric must be None for {method!r}, which has none")
    if batches is not None and batches < 1:
        raise ValueError(f"head_scores: batches must be at least 1, got {batches}")


def _name(loss: Callable[..., Any]) -> str:
    return getattr(loss, "__qualname__", type(loss).__qualname__)


def _drops(values: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    """Metric of the whole model minus that without each head; a group shares its drop equally."""
    rows, start = [], 1
    for site in sites:
        count = len(site.held) // site.group
        drops = (values[0] - values[start : start + count]) / site.group
        rows.append(drops.repeat_interleave(site.group))
        start += count
    return rows


def _magnitude(adapter: Adapter, sites: Sequence[Site]) -> list[Tensor]:
    return [_magnitudes(adapter.weights(site)).cpu() for site in sites]


def _magnitudes(weights: HeadWeights) -> Tensor:
    """(H,): geometric mean of ||W_o W_v||_F and ||W_q^T W_k||_F of every head.

    ||A B||_F^2 = <A^T A, B B^T>, so the C x C products are never formed: D x D ones suffice.
    """
    q, k, v, proj = (None if w is None else w.double() for w in weights)

    def gram(rows: Tensor) -> Tensor:
        return rows @ rows.transpose(-1, -2)

    write = (gram(proj.transpose(-1, -2)) * gram(v)).sum((-1, -2))  # type: ignore[union-attr, arg-type]
    # A norm of queries and keys hides their size: then every head looks as hard as any other.
    look = torch.ones_like(write) if q is None or k is None else (gram(q) * gram(k)).sum((-1, -2))
    # The squares of both norms: their product to the power 1/4 is the geometric mean.
    return (write * look).clamp_min(0) ** 0.25


def _unit_magnitudes(site: Site) -> Tensor:
    """(U,): geometric mean of the norms of everything that belongs to a hidden unit."""
    squares: dict[tuple[str, int], Tensor] = {}
    for name, (axis, tensor) in site.tensors().items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and site.module.get_submodule(owner) is site.norm:
            continue  # what a norm adds is the same for every input
        rows = tensor.detach().double().movedim(axis.dim, 0).unflatten(0, (axis.parts, -1))
        for part, row in enumerate(rows):
            square = row.flatten(1).square().sum(1) if row.dim() > 1 else row.square()
            squares[owner, part] = squares.get((owner, part), 0) + square
    return torch.stack([square.sqrt().log() for square in squares.values()]).mean(0).exp()
