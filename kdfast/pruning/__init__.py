# SPDX-License-Identifier: Apache-2.0
"""Head scores, selection, surgery and accounting. See docs/pruning.md."""

from kdfast.pruning.report import PruningReport, pruning_report
from kdfast.pruning.scores import HeadScores, head_scores
from kdfast.pruning.select import select_heads
from kdfast.pruning.surgery import prune_heads

__all__ = [
    "HeadScores",
    "PruningReport",
    "head_scores",
    "prune_heads",
    "pruning_report",
    "select_heads",
]
