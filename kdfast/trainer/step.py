# SPDX-License-Identifier: Apache-2.0
"""One training step up to the gradient: batches in, losses and accumulated gradients out.

Where memory runs out, in any process, all of them cut their batches into smaller pieces and take
the step again: the effective batch stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdfast.machine.memory import is_out_of_memory, release
from kdfast.trainer.exchange import Agreed, Exchange
from kdfast.trainer.feed import Batch
from kdfast.trainer.logs import LOG
from kdfast.trainer.state import rng_state, set_rng_state

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """What a step works with: a job's module and optimiser as Accelerate runs them.

    Attributes:
        title: Of the job, for messages.
        accelerator: Device, autocast, loss scale and processes.
        module: The job's module behind Accelerate's wrapper; forwards go through it.
        optimizer: The job's optimiser behind Accelerate's wrapper.
        together: Images of a step in all processes: the effective batch.
        weights: What the mean loss of each batch of a step counts in this process.
        leaves_now: Says whether a signal asks this process to leave in mid-step. A process that
            trains with others never does: it ends the step, so that all stop at the same one.
        exchange: Averages the gradients of several processes; None: there is one process, or the
            wrapper does it, as that of a sharded module has to.
    """

    title: str
    accelerator: Accelerator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    together: int
    weights: tuple[float, ...]
    leaves_now: Callable[[], bool]
    exchange: Exchange | None = None

    @property
    def sharded(self) -> bool:
        """Whether processes wait for each other in every forward, so that all need as many."""
        return self.exchange is None and self.accelerator.num_processes > 1

    @property
    def largest(self) -> int:
        """Images of the largest forward in any process."""
        return math.ceil(self.together / (self.accelerator.num_processes * len(self.weights)))

    def synchronised(self, last: bool) -> Any:
        """Context of a forward and backward: processes exchange gradients in the last one only."""
        if self.exchange is None:
            return nullcontext() if last else self.accelerator.no_sync(self.module)
        return self.exchange.sending() if last else nullcontext()


@dataclass(frozen=True)
class StepResult:
    """What a step found; its gradient is in the parameters.

    Attributes:
        losses: Scalars for the log; ``total`` is the one that was minimised. Their mean over the
            processes is that over all images of the step.
        batches: The batches that were used.
        outputs: What the job's step has to tell the job's watch.
    """

    losses: Losses
    batches: list[Batch]
    outputs: Any = None


class Step(Protocol):
    """What a job does in a step before its optimiser: forward, loss and backward.

    Attributes:
        parts: Pieces that a batch is cut into; a part of every checkpoint.
    """

    parts: int

    def __call__(self, prepared: Prepared, batches: Iterator[Batch], epoch: int) -> StepResult:
        """Leave the gradient of the step's mean loss in the parameters.

        Args:
            prepared: Module, optimiser and processes.
            batches: The rest of the epoch; a step takes one for each of ``prepared.weights``.
            epoch: Counted from 0.
        """


class Inputs(NamedTuple):
    """What the module is called with for one batch: ``module(images, labels, epoch, *more)``.

    Attributes:
        images: (B, ...).
        labels: As the module takes them; only a tensor or None can be cut into pieces.
        more: Further tensors of B rows, or None.
        weight: What the mean loss of the batch counts.
    """

    images: Tensor
    labels: Any
    more: tuple[Tensor | None, ...] = ()
    weight: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether it cannot be cut."""
        return not all(x is None or isinstance(x, Tensor) for x in (self.labels, *self.more))

    def cut(self, piece: slice) -> Inputs:
        """Some rows."""
        if self.whole:
            return self
        labels, *more = (None if x is None else x[piece] for x in (self.labels, *self.more))
        return Inputs(self.images[piece], labels, tuple(more), self.weight)


class Piecewise:
    """Forwards and backwards of a step, in smaller pieces since memory ran out.

    Attributes:
        parts: Pieces that a batch is cut into; 1 at first, and the same in all processes.
    """

    def __init__(self) -> None:
        self.parts = 1

    def gradient(
        self, prepared: Prepared, inputs: Sequence[Inputs], epoch: int
    ) -> tuple[Losses, list[Tensor]]:
        """Leave the gradient of the mean loss of batches in the parameters.

        Args:
            prepared: Module, optimiser and processes.
            inputs: The batches; one for each of ``prepared.weights``.
            epoch: Counted from 0.

        Returns:
            The module's losses, weighted as in ``StepResult``, and what else each piece gave.

        Raises:
            RuntimeError: Memory does not suffice for single images, or batches cannot be cut.
        """
        exchange = prepared.exchange
        largest = max(len(x.images) for x in inputs)
        if exchange is not None:
            exchange.share_buffers()
        while True:
            generators = rng_state()
            found, error = None, None
            if exchange is not None:
                exchange.begin()
            try:
                found = self._attempt(prepared, inputs, epoch)
            except RuntimeError as problem:
                alone = prepared.accelerator.num_processes == 1
                if not is_out_of_memory(problem) or not (alone or exchange):
                    raise
                # Its traceback would keep the tensors of the step alive.
                error = problem.with_traceback(None)
            agreed = Agreed(error is not None, largest)
            if exchange is not None:
                agreed = exchange.finish(failed=agreed.failed, largest=largest)
            if found is not None and not agreed.failed:
                return found
            found = None
            self._halve(prepared, inputs, agreed.largest, error)
            prepared.optimizer.zero_grad(set_to_none=True)
            release(prepared.accelerator.device)
            set_rng_state(generators)

    def _attempt(
        self, prepared: Prepared, inputs: Sequence[Inputs], epoch: int
    ) -> tuple[Losses, list[Tensor]]:
        """The gradient of this process, perhaps averaged already."""
        means: Losses = {}
        outputs: list[Tensor] = []
        pieces = list(self._pieces(inputs, prepared))
        for number, (piece, share) in enumerate(pieces):
            with prepared.synchronised(number == len(pieces) - 1):
                found = prepared.module(piece.images, piece.labels, epoch, *piece.more)
                losses, *rest = found if isinstance(found, tuple) else (found,)
                prepared.accelerator.backward(losses["total"] * (piece.weight * share))
            if share:
                outputs += rest
            for name, value in losses.items():
                part = value.detach().float() * share
                means[name] = means[name] + part if name in means else part
            if prepared.leaves_now():
                break
        return means, outputs

    def _pieces(
        self, inputs: Sequence[Inputs], prepared: Prepared
    ) -> Iterator[tuple[Inputs, float]]:
        """What goes through the module at a time, and what its mean loss counts."""
        for batch, weight in zip(inputs, prepared.weights, strict=True):
            rows = len(batch.images)
            size = rows if batch.whole else math.ceil(rows / self.parts)
            starts = range(0, rows, size)
            for start in starts:
                piece = batch.cut(slice(start, start + size))
                yield piece, weight * (len(piece.images) / rows)
            if prepared.sharded and not batch.whole:
                # Another process may have more pieces: these count nothing.
                for _ in range(len(starts), min(self.parts, prepared.largest)):
                    yield batch.cut(slice(0, 1)), 0.0

    def _halve(
        self,
        prepared: Prepared,
        inputs: Sequence[Inputs],
        largest: int,
        error: RuntimeError | None,
    ) -> None:
        """Raises RuntimeError where pieces cannot be smaller, in all processes."""
        pieces = self.parts * 2
        if inputs[0].whole or pieces > largest:
            least = "a batch that cannot be cut" if inputs[0].whole else "single images"
            raise RuntimeError(
                f"{prepared.title}: out of memory with {least}; a smaller model, batch or size, "
                "checkpointing=true or precision=bf16 needs less"
            ) from error
        self.parts = pieces
        LOG.warning(
            "%s: out of memory: the batch of %d goes on in %d pieces of %d or less, their gradients"
            " are accumulated; the effective batch stays %d",
            *(prepared.title, largest, pieces, math.ceil(largest / pieces), prepared.together),
        )


class MeanOfBatches(Piecewise):
    """The step of a module that takes ``(images, labels, epoch)`` and gives losses as scalars."""

    def __call__(self, prepared: Prepared, batches: Iterator[Batch], epoch: int) -> StepResult:
        """See ``Step``."""
        used = [next(batches) for _ in prepared.weights]
        inputs = [Inputs(batch.images, batch.labels, weight=batch.weight) for batch in used]
        losses, _ = self.gradient(prepared, inputs, epoch)
        return StepResult(losses, used)
