# SPDX-License-Identifier: Apache-2.0
"""How far a pruned model's answers are from the original's. N pictures, C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.pruning.inputs import outputs


class Quality(NamedTuple):
    """What is left of a model's answers.

    Attributes:
        cosine: Mean over pictures of the cosine between the model's output and the original's.
        agreement: Share of the pictures that get the class that the original gives them; None
            without classes.
        accuracy: Share of the pictures that get their own class; None without labels.
        original: The original's accuracy; None without labels.
        images: N.
    """

    cosine: float
    agreement: float | None
    accuracy: float | None
    original: float | None
    images: int

    @property
    def main(self) -> tuple[str, float]:
        """The number that says most, with its name."""
        for name, value in (("top-1 accuracy", self.accuracy), ("same class", self.agreement)):
            if value is not None:
                return name, value
        return "output cosine", self.cosine


@torch.no_grad()
def answers(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """The model's outputs for all pictures of the batches, (N, ...) on the CPU, fp32."""
    return torch.cat([_tensor(outputs(model, batch)).float().cpu() for batch in batches])


def quality_of(
    got: Tensor, original: Tensor, *, classes: int = 0, labels: Tensor | None = None
) -> Quality:
    """Compares two models' answers.

    Args:
        got: Of the pruned model, (N, ...) fp32.
        original: Of the model that it was cut from, of the same shape.
        classes: C, where the answers are scores of classes; else 0.
        labels: (N,) numbers of the pictures' own classes.

    Raises:
        ValueError: The shapes differ.
    """
    if got.shape != original.shape:
        raise ValueError(
            f"quality: answers must have the original's shape {tuple(original.shape)}, got "
            f"{tuple(got.shape)}"
        )
    cosine = F.cosine_similarity(got.flatten(1).double(), original.flatten(1).double()).mean()
    agreement = accuracy = whole = None
    if classes > 1 and got.dim() == 2:
        mine, theirs = got.argmax(1), original.argmax(1)
        agreement = _share(mine, theirs)
        if labels is not None:
            accuracy, whole = _share(mine, labels), _share(theirs, labels)
    return Quality(cosine.item(), agreement, accuracy, whole, len(got))


def _share(found: Tensor, wanted: Tensor) -> float:
    return (found == wanted).double().mean().item()


def _tensor(output: Any) -> Tensor:
    """What answers: the logits where there are such, else the first tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):  # Hugging Face's results are mappings, too
        if isinstance(output.get("logits"), Tensor):
            return _tensor(output["logits"])
        output = list(output.values())
    return _tensor(output[0])
