# SPDX-License-Identifier: Apache-2.0
"""Classification sets: replayable pictures with targets. See docs/use/classification_data.md."""

from kdfast.data.labelled.augment import AugmentSpec
from kdfast.data.labelled.classification import (
    KINDS,
    Classification,
    LabelledImages,
    build_classification,
    describe_classification,
    worker_init,
)

__all__ = [
    "KINDS",
    "AugmentSpec",
    "Classification",
    "LabelledImages",
    "build_classification",
    "describe_classification",
    "worker_init",
]
