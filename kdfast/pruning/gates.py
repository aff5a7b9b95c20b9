# SPDX-License-Identifier: Apache-2.0
"""Gate gradients of all heads out of a training loop's own backward. See docs/use/pruning.md.

B batch, H heads, N tokens, D head dim.
"""

from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdfast.pruning.adapter import Site
from kdfast.pruning.families import anatomy_of
from kdfast.pruning.inputs import count
from kdfast.pruning.observe import split
from kdfast.pruning.scores import HeadScores

if TYPE_CHECKING:
    from typing_extensions import Self


class HeadGates:
    """Watches the backward passes inside a ``with`` block, at no extra pass of any kind.

    A gate x_h of value 1 on a head's context has the gradient ``d loss / d x_h = sum(c_h * g_h)``
    with g the gradient of the context c, which every backward computes anyway for the projections
    before it. Nothing is changed in the model, its outputs or its gradients.

    Args:
        model: As in ``head_scores``; with at least one parameter that is trained.

    Attributes:
        last: Signed gate gradients (H,) fp64 of the last backward, per block.

    Raises:
        TypeError: The model's family is not known.
    """

    def __init__(self, model: nn.Module) -> None:
        anatomy = anatomy_of("HeadGates", model)
        self._model, self._batch = model, 1
        self._sites = anatomy.attentions
        self._metadata: dict[str, Any] = {
            "model": anatomy.adapter.family,
            "heads": [site.held for site in self._sites],
        }
        if any(site.group > 1 for site in self._sites):
            self._metadata["groups"] = [site.group for site in self._sites]
        self._handles: list[RemovableHandle] = []
        self._sums: list[Tensor | None] = [None] * len(self._sites)
        self._images = [0] * len(self._sites)
        self.last: list[Tensor | None] = [None] * len(self._sites)

    def __enter__(self) -> "Self":
        watch = self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._handles = [watch] + [
            site.projection.register_forward_pre_hook(partial(self._watch, index))
            for index, site in enumerate(self._sites)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = count((*args, *kwargs.values()))

    def _watch(self, index: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        context = args[0]
        if context.requires_grad and torch.is_grad_enabled():
            context.register_hook(partial(self._add, index, self._batch, context.detach()))

    @torch.no_grad()
    def _add(self, index: int, images: int, context: Tensor, grad: Tensor) -> None:
        site: Site = self._sites[index]
        # Per image, so that gradients of opposite sign of different images do not cancel.
        each = (split(context, site).double() * split(grad, site).double()).sum((1, 3))
        # Windows of an image follow one another.
        each = each.unflatten(0, (images, -1)).sum(1)
        total, old = len(each) * each.abs().sum(0), self._sums[index]
        self._sums[index] = total if old is None else old + total
        self._images[index] += len(each)
        self.last[index] = each.sum(0)

    def scores(self) -> HeadScores:
        """Mean over images of ``|d loss / d x_h|``, for losses that are a mean over the batch.

        Raises:
            ValueError: No backward has run inside the ``with`` block.
        """
        rows = []
        for block, (total, images) in enumerate(zip(self._sums, self._images, strict=True)):
            if total is None:
                raise ValueError(f"HeadGates: scores need a backward pass, block {block} saw none")
            rows.append((total / images).cpu())
        return HeadScores(rows, "gate", {**self._metadata, "images": max(self._images)})
