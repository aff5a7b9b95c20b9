# SPDX-License-Identifier: Apache-2.0
"""Prune a Vision Transformer's attention heads and distil the loss away, with fused kernels."""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("kdfast.kernels") is None:
    raise ImportError(
        "kdfast is imported from a source tree that is not installed; in that folder run "
        "`pip install --no-build-isolation -e .`, or import the installed package from elsewhere"
    )

from kdfast._version import __version__

if TYPE_CHECKING:
    from kdfast.distillation.start import distil
    from kdfast.models.orion.export import export_orion
    from kdfast.nn import AccelerateReport, accelerate, restore
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
    "distil",
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

# The names that each module defines.
_DEFINED = {
    "kdfast.distillation.start": ("distil",),
    "kdfast.models.orion.export": ("export_orion",),
    "kdfast.nn": ("AccelerateReport", "accelerate", "restore"),
    "kdfast.ops._library": ("FallbackWarning", "NotCompiledWarning"),
    "kdfast.ops.attention_distill": ("attention_distill",),
    "kdfast.ops.feature_loss": ("feature_loss",),
    "kdfast.ops.geometry": ("Rope", "Window"),
    "kdfast.ops.head_gather": ("head_gather",),
    "kdfast.ops.head_gather_block": ("head_gather_block",),
    "kdfast.ops.kd_loss": ("kd_loss",),
    "kdfast.ops.linear": ("linear",),
    "kdfast.ops.linear_kd_loss": ("linear_kd_loss",),
    "kdfast.ops.multilabel_kd_loss": ("multilabel_kd_loss",),
    "kdfast.ops.pruned_attention": ("pruned_attention",),
    "kdfast.ops.sdpa": ("scaled_dot_product_attention",),
    "kdfast.ops.swiglu_norm": ("swiglu_norm",),
    "kdfast.pictures.maps": ("attention_maps",),
    "kdfast.pruning": (
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
    # Not of the package: it has a module of that name.
    "kdfast.pruning.by_latency": ("LatencySelection", "select"),
    "kdfast.pruning.saving": ("load_pretrained", "save_pretrained"),
}
_MODULE = {name: module for module, names in _DEFINED.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports on first use: torch and timm take seconds, and help needs neither."""
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether they were used already or not, and what every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


if "torch" in sys.modules:
    # Who has torch pays little for the ops, and finds them under torch.ops.kdfast at once.
    for _module in _DEFINED:
        if _module.startswith("kdfast.ops."):
            importlib.import_module(_module)
