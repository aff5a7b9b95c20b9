# SPDX-License-Identifier: Apache-2.0
"""What a command line names: models (``--model``, ``--checkpoint``) and pictures."""

from kdfast.sources.error import SourceError
from kdfast.sources.models import (
    MODEL_HELP,
    is_random,
    load_model,
    load_saved,
    require_timm_name,
)
from kdfast.sources.pictures import crops_of, image_batches, load_images, noise, transform_of

__all__ = [
    "MODEL_HELP",
    "SourceError",
    "crops_of",
    "image_batches",
    "is_random",
    "load_images",
    "load_model",
    "load_saved",
    "noise",
    "require_timm_name",
    "transform_of",
]
