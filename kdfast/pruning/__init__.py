# SPDX-License-Identifier: Apache-2.0
"""Head and hidden-unit scores, selection, surgery and accounting. See docs/use/pruning.md."""

from kdfast.pruning.adapter import Site
from kdfast.pruning.block_times import LatencyTable, latency_table
from kdfast.pruning.budget import select_together
from kdfast.pruning.calibration import Calibration, calibrate
from kdfast.pruning.constant import drop_blocks
from kdfast.pruning.evaluate import evaluate_selections
from kdfast.pruning.families import register_family
from kdfast.pruning.gates import HeadGates
from kdfast.pruning.report import PruningReport, pruning_report
from kdfast.pruning.scores import HeadScores, head_scores, mlp_scores
from kdfast.pruning.select import select_heads
from kdfast.pruning.site_adapter import SiteAdapter
from kdfast.pruning.surgery import prune_heads

__all__ = [
    "Calibration",
    "HeadGates",
    "HeadScores",
    "LatencyTable",
    "PruningReport",
    "Site",
    "SiteAdapter",
    "calibrate",
    "drop_blocks",
    "evaluate_selections",
    "head_scores",
    "latency_table",
    "mlp_scores",
    "prune_heads",
    "pruning_report",
    "register_family",
    "select_heads",
    "select_together",
]
