# SPDX-License-Identifier: Apache-2.0
"""ORION's detection head and map head in plain PyTorch, and their losses."""

from kdfast.models.orion.batch import Batch, Frame, Lanes, Objects, rigid_inverse
from kdfast.models.orion.checkpoint import load_orion_heads
from kdfast.models.orion.config import DetectionConfig, HeadsConfig, MapConfig
from kdfast.models.orion.memory import HeadsMemory
from kdfast.models.orion.task import HeadsOutput, OrionHeads, TaskLoss, task_loss

__all__ = [
    "Batch",
    "DetectionConfig",
    "Frame",
    "HeadsConfig",
    "HeadsMemory",
    "HeadsOutput",
    "Lanes",
    "MapConfig",
    "Objects",
    "OrionHeads",
    "TaskLoss",
    "load_orion_heads",
    "rigid_inverse",
    "task_loss",
]
