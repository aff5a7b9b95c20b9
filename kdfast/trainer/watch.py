# SPDX-License-Identifier: Apache-2.0
"""What a run does beside the steps: evaluation, averages, and the decision to end early."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kdfast.trainer.step import StepResult

Row = dict[str, float | int]


class Watch:
    """Is told by a loop how the training goes; this one does nothing.

    Every method is called on all processes unless it says otherwise.

    Attributes:
        headline: Column of ``on_epoch``'s row that is shown beside the steps, on the bar and in
            the curves; None: the first one but step and epoch.
    """

    headline: str | None = None

    def headline_of(self, columns: Iterable[str]) -> str | None:
        """The column of a row of epochs that is shown beside the steps; None: it has none."""
        names = [name for name in columns if name not in ("step", "epoch")]
        if self.headline is not None:
            return self.headline if self.headline in names else None
        return names[0] if names else None

    def on_start(self) -> None:
        """Called before the first step, and before a checkpoint is loaded."""

    def on_step(self, step: int, result: StepResult) -> None:
        """Called after the optimiser.

        Args:
            step: Optimiser steps that are done.
            result: What the step found.
        """

    def on_epoch(self, epoch: int, step: int, lr: float) -> Row | None:
        """Called after the last step of an epoch, before its checkpoint.

        Args:
            epoch: Counted from 0.
            step: Optimiser steps that are done.
            lr: Learning rate of the last step.

        Returns:
            Row of the CSV of epochs, with ``step``; None: there is none. Modules may be left in
            eval mode.
        """
        return None

    def is_best(self) -> bool:
        """Whether the checkpoint of now is to be kept as the best one; called once for each."""
        return False

    def finished(self) -> bool:
        """Whether the training ends before its last epoch; the same on all processes."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the loop's own keys; the first process's is saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint, which holds what ``state_dict`` gave."""
