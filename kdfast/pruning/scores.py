# SPDX-License-Identifier: Apache-2.0
"""How important every attention head is, by one of four criteria. See docs/pruning.md.

B batch, H heads, N tokens, D head dim, C channels.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.pruning.adapter import Adapter, HeadWeights, adapter_of
from kdfast.pruning.observe import (
    ContextObserver,
    EntropyObserver,
    Observer,
    RandomProjection,
    observe,
)

METHODS = ("magnitude", "gradient", "taylor", "entropy")
FORMAT = "kdfast.head_scores/1"


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Importance of every head of a model; higher is more important.

    Attributes:
        scores: (H,) fp64 per block, by the head's position in the scored model.
        method: What they measure.
        metadata: JSON values: options, model, original head indices, batches and images seen.
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
            if row.dim() != 1 or row.numel() == 0:
                raise ValueError(
                    f"HeadScores: block {block} must be (H,) with at least one head, "
                    f"got {tuple(row.shape)}"
                )
            if not torch.isfinite(row).all():
                raise ValueError(
                    f"HeadScores: {self.method} scores of block {block} must be finite, "
                    f"got {row.tolist()}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; ``load`` restores every bit of the scores."""
        content = {
            "format": FORMAT,
            "method": self.method,
            "metadata": self.metadata,
            "scores": [row.tolist() for row in self.scores],
        }
        Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadScores":
        """Reads what ``save`` wrote.

        Raises:
            ValueError: The file is not JSON of this format, or the scores are not finite numbers.
        """
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            got = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"HeadScores: {path} must have format {FORMAT!r}, got {got!r}")
        rows = [torch.tensor(row, dtype=torch.float64) for row in content["scores"]]
        return cls(rows, content["method"], content["metadata"])


def head_scores(
    model: nn.Module,
    method: str,
    data: Iterable[Any] | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
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
    the exact entropy of the attention rows, padded keys included.

    Args:
        model: An EVAViT, already pruned or not.
        method: "magnitude", "gradient", "taylor" or "entropy".
        data: Batches: the images (B, 3, H, W), a dict with them under "image", or a tuple or list
            that starts with them. Tensors are moved to the model's device. None for "magnitude".
        loss: ``loss(model output, batch)``, a scalar that is the mean over the batch's images. For
            "gradient" and "taylor" only. None: a random projection of the output, see docs.
        batches: Use at most so many; None: all.
        important: For "entropy", which heads score high: "low" (focused) or "high" (spread).
        unit: For "entropy": "share" of the largest possible value, or "nats".
        seed: Of the random projection.
        progress: Show a progress bar on a terminal.

    Returns:
        Scores in [0, inf), higher is more important; for "entropy" with "low" the distance to the
        largest entropy, which is KL(attention || uniform).

    Raises:
        TypeError: The model's family is not known, or a batch or a loss is of another kind.
        ValueError: An option is unknown or does not belong to the method, there is no batch, or a
            loss or a score is not finite.

    The model is left as it was: training modes, ``requires_grad``, ``grad`` and hooks, also when
    an error is raised.
    """
    adapter = adapter_of("head_scores", model)
    _check_options(method, loss, batches, important, unit)
    metadata: dict[str, Any] = {"model": adapter.family, "heads": adapter.heads(model)}
    if method == "magnitude":
        if data is not None:
            raise ValueError(
                "head_scores: data must be None for 'magnitude', which reads no images"
            )
        return HeadScores(_magnitude(adapter, model), method, metadata)
    if data is None:
        raise ValueError(f"head_scores: data must be given for {method!r}, got None")
    observer: Observer
    if method == "entropy":
        observer = EntropyObserver(adapter, model, important, unit)
        metadata.update(important=important, unit=unit)
    else:
        observer = ContextObserver(adapter, model, method, loss or RandomProjection(seed))
        metadata["loss"] = _name(loss) if loss else f"random projection, seed {seed}"
    scores, seen = observe(model, observer, data, batches, progress)
    return HeadScores(scores, method, {**metadata, **seen})


def _check_options(
    method: str, loss: object, batches: int | None, important: str, unit: str
) -> None:
    for name, value, known in (
        ("method", method, METHODS),
        ("important", important, ("low", "high")),
        ("unit", unit, ("share", "nats")),
    ):
        if value not in known:
            raise ValueError(f"head_scores: {name} must be one of {known}, got {value!r}")
    if loss is not None and method in ("magnitude", "entropy"):
        raise ValueError(f"head_scores: loss must be None for {method!r}, which has no gradient")
    if batches is not None and batches < 1:
        raise ValueError(f"head_scores: batches must be at least 1, got {batches}")


def _name(loss: Callable[..., Any]) -> str:
    return getattr(loss, "__qualname__", type(loss).__qualname__)


def _magnitude(adapter: Adapter, model: nn.Module) -> list[Tensor]:
    weights = (adapter.weights(attention) for attention in adapter.attentions(model).values())
    return [_magnitudes(HeadWeights(*(w.double() for w in block))).cpu() for block in weights]


def _magnitudes(weights: HeadWeights) -> Tensor:
    """(H,): geometric mean of ||W_o W_v||_F and ||W_q^T W_k||_F of every head.

    ||A B||_F^2 = <A^T A, B B^T>, so the C x C products are never formed: D x D ones suffice.
    """
    q, k, v, proj = weights

    def gram(rows: Tensor) -> Tensor:
        return rows @ rows.transpose(-1, -2)

    write = (gram(proj.transpose(-1, -2)) * gram(v)).sum((-1, -2))
    look = (gram(q) * gram(k)).sum((-1, -2))
    # The squares of both norms: their product to the power 1/4 is the geometric mean.
    return (write * look).clamp_min(0) ** 0.25
