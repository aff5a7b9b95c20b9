# SPDX-License-Identifier: Apache-2.0
"""Prune a Vision Transformer's attention heads and distil the loss away, with fused kernels."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("kdfast.kernels") is None:
    raise ImportError(
        "kdfast is imported from a source tree that is not installed; in that folder run "
        "`pip install --no-build-isolation -e .`, or import the installed package from elsewhere"
    )

from kdfast._version import __version__
from kdfast.ops._library import FallbackWarning, NotCompiledWarning
from kdfast.ops.attention_distill import attention_distill
from kdfast.ops.feature_loss import feature_loss
from kdfast.ops.geometry import Rope, Window
from kdfast.ops.head_gather import head_gather
from kdfast.ops.head_gather_block import head_gather_block
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.linear import linear
from kdfast.ops.linear_kd_loss import linear_kd_loss
from kdfast.ops.multilabel_kd_loss import multilabel_kd_loss
from kdfast.ops.pruned_attention import pruned_attention
from kdfast.ops.sdpa import scaled_dot_product_attention
from kdfast.ops.swiglu_norm import swiglu_norm

if TYPE_CHECKING:
    from kdfast.models.orion.export import export_orion
    from kdfast.nn import AccelerateReport, accelerate, restore
    from kdfast.pictures.maps import attention_maps
    from kdfast.pruning import (
        Calibration,
        HeadGates,
        HeadScores,
        LatencyTable,
        calibrate,
        drop_blocks,
        evaluate_selections,
        head_scores,
        latency_table,
        mlp_scores,
        prune_heads,
        pruning_report,
        select_heads,
        select_together,
    )
    from kdfast.pruning.by_latency import LatencySelection, select
    from kdfast.pruning.saving import load_pretrained, save_pretrained

__all__ = [
    "AccelerateReport",
    "Calibration",
    "FallbackWarning",
    "HeadGates",
    "HeadScores",
    "LatencySelection",
    "LatencyTable",
    "NotCompiledWarning",
    "Rope",
    "Window",
    "__version__",
    "accelerate",
    "attention_distill",
    "attention_maps",
    "calibrate",
    "drop_blocks",
    "evaluate_selections",
    "export_orion",
    "feature_loss",
    "head_gather",
    "head_gather_block",
    "head_scores",
    "kd_loss",
    "latency_table",
    "linear",
    "linear_kd_loss",
    "load_pretrained",
    "mlp_scores",
    "multilabel_kd_loss",
    "prune_heads",
    "pruned_attention",
    "pruning_report",
    "restore",
    "save_pretrained",
    "scaled_dot_product_attention",
    "select",
    "select_heads",
    "select_together",
    "swiglu_norm",
]

_LAZY = (
    dict.fromkeys(
        (
            "Calibration",
            "HeadGates",
            "HeadScores",
            "LatencyTable",
            "calibrate",
            "drop_blocks",
            "evaluate_selections",
            "head_scores",
            "latency_table",
            "mlp_scores",
            "prune_heads",
            "pruning_report",
            "select_heads",
            "select_together",
        ),
        "kdfast.pruning",
    )
    # Not of the package: it has a module of that name.
    | dict.fromkeys(("LatencySelection", "select"), "kdfast.pruning.by_latency")
    | dict.fromkeys(("AccelerateReport", "accelerate", "restore"), "kdfast.nn")
    | {"attention_maps": "kdfast.pictures.maps", "export_orion": "kdfast.models.orion.export"}
    | dict.fromkeys(("load_pretrained", "save_pretrained"), "kdfast.pruning.saving")
)


def __getattr__(name: str) -> Any:
    """Imports on first use what needs the models, hence timm, which takes seconds to import."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether they were used already or not, and what every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
