# SPDX-License-Identifier: Apache-2.0
"""The pictures that Hugging Face models take: what lies beside their weights, or their family's.

What was read becomes an attribute of the model's configuration: pruned copies keep it, and folders
that they are saved to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.data.constants import (
    DEFAULT_CROP_PCT,
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

# Files that hold the facts, and the attribute of a configuration that keeps them.
FILES = ("preprocessor_config.json", "processor_config.json")
KEPT = "kdfast_pictures"
# ConvNeXt's processor crops pictures below this size, and squashes larger ones.
_CROPPED_BELOW = 384
# PIL's numbers.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_HALF = (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
_CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
_IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
# Mean and deviation that the published models of a type were trained with; of the others it is
# mostly ImageNet's.
_FAMILIES = {
    **dict.fromkeys(("vit", "beit", "data2vec-vision", "siglip", "siglip2"), _HALF),
    **dict.fromkeys(("clip", "clipseg", "blip", "owlvit", "owlv2", "aimv2"), _CLIP),
}


def pictures_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """How a model's pictures are prepared, by what an image processor of transformers saved.

    Args:
        content: Of one of ``FILES``.

    Returns:
        JSON values: ``mean`` and ``std`` of pictures in [0, 1], ``size`` (height, width),
        ``crop_pct``, ``crop_mode`` and ``interpolation``, as timm names them; only what the file
        says.

    Raises:
        ValueError: A value is none that a processor saves.
    """
    own = content.get("image_processor", content)
    if not isinstance(own, Mapping):
        raise ValueError(f"image_processor must be an object, got {own!r:.80}")
    return {**_normalisation(own), **_geometry(own)}


def _normalisation(own: Mapping[str, Any]) -> dict[str, Any]:
    scale = 1.0
    if own.get("do_rescale", True) is False:
        scale = 255.0  # it takes what the file holds
    elif "rescale_factor" in own:
        scale = 255 * _number("rescale_factor", own["rescale_factor"])
    if scale <= 0:
        raise ValueError(f"rescale_factor must be above 0, got {own['rescale_factor']!r:.80}")
    if own.get("do_normalize", True) is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif own.get("image_mean") is None or own.get("image_std") is None:
        return {}
    else:
        mean, std = _three("image_mean", own["image_mean"]), _three("image_std", own["image_std"])
    if min(std) <= 0:
        raise ValueError(f"image_std must be above 0, got {own['image_std']!r:.80}")
    return {"mean": [x / scale for x in mean], "std": [x / scale for x in std]}


def _geometry(own: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    resample = own.get("resample")
    if isinstance(resample, int) and resample in _RESAMPLE:
        found["interpolation"] = _RESAMPLE[resample]
    size, crop = (_sides(name, own.get(name)) for name in ("size", "crop_size"))
    if own.get("do_center_crop") and crop is not None:
        found |= {"size": crop, "crop_pct": 1.0, "crop_mode": "center"}
        if own.get("do_resize", True) is not False and size is not None:
            found["crop_pct"] = min(1.0, min(crop) / min(size))
    elif size is not None:
        share, whole = own.get("crop_pct"), own.get("size")
        cut = share is not None and min(size) < _CROPPED_BELOW
        shortest = isinstance(whole, Mapping) and "shortest_edge" in whole and share is None
        found |= {"size": size, "crop_pct": _number("crop_pct", share) if cut else 1.0}
        found["crop_mode"] = "center" if cut or shortest else "squash"
    if not 0 < found.get("crop_pct", 1.0) <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {found['crop_pct']}")
    return found


def _sides(name: str, value: Any) -> list[int] | None:
    """Height and width; None where there are none."""
    if isinstance(value, Mapping):
        edge = value.get("shortest_edge")
        value = [value.get("height", edge), value.get("width", edge)]
        if value == [None, None]:
            return None
    sides = [value, value] if isinstance(value, int) else value
    if sides is None:
        return None
    if not isinstance(sides, list) or len(sides) != 2:
        raise ValueError(f"{name} must be a side, or height and width, got {value!r:.80}")
    if not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"{name} must be whole numbers above 0, got {value!r:.80}")
    return sides


def _three(name: str, value: Any) -> tuple[float, float, float]:
    values = value if isinstance(value, list) else [value] * 3
    if len(values) == 1:
        values = values * 3
    if len(values) != 3:
        raise ValueError(f"{name} must be three numbers, got {value!r:.80}")
    first, second, third = (_number(name, x) for x in values)
    return first, second, third


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r:.80}")
    return float(value)


def check_pictures(kept: Any) -> None:
    """Raises ValueError unless a value is a result of ``pictures_of``, or None."""
    if kept is None:
        return
    known = {"mean", "std", "size", "crop_pct", "crop_mode", "interpolation"}
    if not isinstance(kept, Mapping) or not set(kept) <= known:
        raise ValueError(f"{KEPT} must have keys of {', '.join(sorted(known))}, got {kept!r:.200}")
    for name in {"mean", "std"} & set(kept):
        if min(_three(f"{KEPT}: {name}", kept[name])) <= 0 and name == "std":
            raise ValueError(f"{KEPT}: std must be above 0, got {kept[name]!r:.80}")
    _sides(f"{KEPT}: size", kept.get("size"))
    if not 0 < _number(f"{KEPT}: crop_pct", kept.get("crop_pct", 1.0)) <= 1:
        raise ValueError(f"{KEPT}: crop_pct must be above 0 and at most 1")
    for name, words in (
        ("crop_mode", ("center", "squash")),
        ("interpolation", tuple(_RESAMPLE.values())),
    ):
        if kept.get(name, words[0]) not in words:
            raise ValueError(
                f"{KEPT}: {name} must be of {', '.join(words)}, got {kept[name]!r:.80}"
            )


def pictures_config(config: Any) -> dict[str, Any]:
    """What ``input_config`` says of a model of transformers, by its configuration."""
    kept = dict(getattr(config, KEPT, None) or {})
    mean, std = _family(config) or _IMAGENET
    side = getattr(config, "image_size", None) or kept.pop("size", 224)
    kept.pop("size", None)
    sides = (side, side) if isinstance(side, int) else tuple(side)
    usual = {"mean": mean, "std": std, "crop_pct": DEFAULT_CROP_PCT, "interpolation": "bilinear"}
    return {"input_size": (3, *sides), **usual, **kept}


def guessed(config: Any) -> str:
    """A word about pictures of a model that came without a file of ``FILES``; "" of others."""
    if not hasattr(config, "model_type") or "mean" in (getattr(config, KEPT, None) or {}):
        return ""
    whose = "ImageNet's" if _family(config) is None else f"that of published {_type(config)} models"
    mean, std = _family(config) or _IMAGENET
    numbers = " and ".join(", ".join(f"{x:.3g}" for x in values) for values in (mean, std))
    return f"no {FILES[0]}: pictures are normalised by {whose}: mean and std {numbers}"


def _type(config: Any) -> str:
    """Type of a model, without the words for its half that sees."""
    return str(getattr(config, "model_type", "")).removesuffix("_model").removesuffix("_vision")


def _family(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    return _FAMILIES.get(_type(config))
