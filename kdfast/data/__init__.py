# SPDX-License-Identifier: Apache-2.0
"""Data for training and distillation.

Views for ORION's encoder (``views``, ``scenes``) come from ``build``; labelled sets for
classification (``labelled``) from ``kdfast.data.labelled.build_classification``.
"""

from kdfast.data.corrupt import Corrupt, CorruptCounter
from kdfast.data.files import CorruptDataError
from kdfast.data.kinds import KINDS, build
from kdfast.data.sampler import EpochSampler
from kdfast.data.scenes import CLASSES, PALETTE
from kdfast.data.views.base import ViewDataset, collate
from kdfast.data.views.gridmask import GridMask
from kdfast.data.views.preprocess import MEAN, STD

__all__ = [
    "CLASSES",
    "KINDS",
    "MEAN",
    "PALETTE",
    "STD",
    "Corrupt",
    "CorruptCounter",
    "CorruptDataError",
    "EpochSampler",
    "GridMask",
    "ViewDataset",
    "build",
    "collate",
]
