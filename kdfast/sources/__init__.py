# SPDX-License-Identifier: Apache-2.0
"""What a command line names: models (``--model``, ``--checkpoint``) and pictures."""

from kdfast.resolve import (
    SourceError,
    check_model_name,
    is_random,
    load_model,
    load_saved,
)
from kdfast.sources.judged import JudgedPictures, judged_pictures
from kdfast.sources.pictures import (
    crops_of,
    image_batches,
    load_images,
    noise,
    picture_size,
    transform_of,
)
from kdfast.sources.shown import is_place

__all__ = [
    "JudgedPictures",
    "SourceError",
    "check_model_name",
    "crops_of",
    "image_batches",
    "is_place",
    "is_random",
    "judged_pictures",
    "load_images",
    "load_model",
    "load_saved",
    "noise",
    "picture_size",
    "transform_of",
]
