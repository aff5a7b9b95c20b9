# SPDX-License-Identifier: Apache-2.0
"""Predicts the memory of training and chooses the batch that fits. See docs/use/memory.md."""

from kdfast.memory.measure import MemoryPlan, Step, plan_step
from kdfast.memory.search import BatchPlan, DoesNotFit, plan_batch, plan_memory

__all__ = [
    "BatchPlan",
    "DoesNotFit",
    "MemoryPlan",
    "Step",
    "plan_batch",
    "plan_memory",
    "plan_step",
]
