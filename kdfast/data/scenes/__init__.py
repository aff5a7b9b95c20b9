# SPDX-License-Identifier: Apache-2.0
"""Synthetic driving scenes with labels, drawn from a seed; see docs/use/data.md."""

from kdfast.data.scenes.camera import VIEWS
from kdfast.data.scenes.dataset import Scenes, draw_world, view
from kdfast.data.scenes.layout import CLASSES, PALETTE

__all__ = ["CLASSES", "PALETTE", "VIEWS", "Scenes", "draw_world", "view"]
