# SPDX-License-Identifier: Apache-2.0
"""Prune a Vision Transformer's attention heads and distil the loss away, with fused kernels."""

import importlib.util

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
from kdfast.ops.kd_loss import kd_loss
from kdfast.ops.pruned_attention import pruned_attention

__all__ = [
    "FallbackWarning",
    "NotCompiledWarning",
    "Rope",
    "Window",
    "__version__",
    "attention_distill",
    "feature_loss",
    "head_gather",
    "kd_loss",
    "pruned_attention",
]
