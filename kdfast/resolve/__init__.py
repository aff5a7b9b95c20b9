# SPDX-License-Identifier: Apache-2.0
"""What a model's name stands for, on command lines and in configs. See docs/use/models.md."""

from kdfast.resolve.architecture import class_count, with_classes
from kdfast.resolve.error import SourceError
from kdfast.resolve.models import (
    check_model_name,
    file_name,
    is_random,
    is_saved,
    load_model,
    load_saved,
)
from kdfast.resolve.near import HUGGING_FACE, TORCHVISION

__all__ = [
    "HUGGING_FACE",
    "TORCHVISION",
    "SourceError",
    "check_model_name",
    "class_count",
    "file_name",
    "is_random",
    "is_saved",
    "load_model",
    "load_saved",
    "with_classes",
]
