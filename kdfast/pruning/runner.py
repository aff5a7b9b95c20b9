# SPDX-License-Identifier: Apache-2.0
"""Runs a model block by block, and watches one site of a block. See docs/use/compensation.md."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.pruning.adapter import Anatomy, Site
from kdfast.pruning.evaluate import replayed
from kdfast.pruning.inputs import Inputs, outputs


class _Reached(Exception):
    """The forward came to the point where the rest of the model is not needed."""


class Runner:
    """A model that runs one block after another on all batches, without the blocks before.

    It keeps what the last finished block gave for every batch. The blocks before that one are
    played back as zeros without memory: only their shapes matter.
    """

    def __init__(self, anatomy: Anatomy, images: Sequence[Tensor | Inputs]) -> None:
        self.anatomy, self.images, self.blocks = anatomy, images, anatomy.blocks
        self._outputs: list[Any] = [None] * len(images)
        self._hollow: list[list[Any]] = [[] for _ in images]

    def run(self, index: int, batch: int, until: nn.Module | None = None) -> Any:
        """Block ``index`` on a batch: its output, or None where ``until`` was entered before."""
        done = self._hollow[batch][:-1] + ([self._outputs[batch]] if index else [])
        result: list[Any] = []

        def stop(_: nn.Module, *rest: Any) -> None:
            result.append(rest[1] if len(rest) > 1 else None)
            raise _Reached

        block = self.blocks[index]
        handles = [block.register_forward_hook(stop)]
        if until is not None:
            handles.append(until.register_forward_pre_hook(stop))
        try:
            with torch.no_grad(), replayed(list(zip(self.blocks, done, strict=False))):
                outputs(self.anatomy.model, self.images[batch])
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return result[0]

    def finish(self, batch: int, output: Any) -> None:
        """Keeps the output of the block that has just run; the next block starts from it."""
        self._outputs[batch] = output
        self._hollow[batch].append(_hollow(output))


def _hollow(output: Any) -> Any:
    """The output with zeros that take no memory in place of its tensors."""
    if isinstance(output, Tensor):
        return output.new_zeros(()).expand(output.shape)
    if isinstance(output, (tuple, list)):
        return type(output)(_hollow(part) for part in output)
    return output


class Watch:
    """What a forward of one block showed of a site: stream before, input, output, pads."""

    def __init__(self, anatomy: Anatomy, site: Site, norm: nn.Module | None) -> None:
        self.adapter, self.site, self.norm = anatomy.adapter, site, norm
        self.before: Tensor | None = None
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.pads: Tensor | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.before = self.input = self.output = self.pads = None
        handles = [
            self.site.module.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.site.projection.register_forward_hook(self._project),
            self.site.projection.register_forward_pre_hook(self._reach),
        ]
        if self.norm is not None:
            handles.append(self.norm.register_forward_pre_hook(self._norm))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.pads = self.adapter.pads(self.site, args, kwargs)

    def _norm(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.before = args[0]

    def _reach(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.input = args[0]

    def _project(self, _: nn.Module, args: Any, output: Any) -> None:
        self.output = output
