# SPDX-License-Identifier: Apache-2.0
"""Arguments of timm's architectures that a file may name: none that makes timm open another one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

# What timm's functions take beside the arguments of the classes in their file.
COMMON = {
    *("num_classes", "in_chans", "img_size", "global_pool", "output_stride"),
    *("drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate", "attn_drop_rate"),
}
# Arguments of classes that hold code or a configuration of timm itself.
CODE = {
    *("self", "args", "kwargs", "device", "dtype", "cfg", "pretrained", "pretrained_cfg"),
    *("checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "features_only"),
}
# Facts of a model about its pictures; others say where its pretrained weights are.
FACTS = {
    *("tag", "input_size", "fixed_input_size", "min_input_size", "pool_size", "crop_pct"),
    *("crop_mode", "interpolation", "mean", "std", "num_classes", "label_offset", "label_names"),
    *("label_descriptions", "test_input_size", "test_crop_pct", "first_conv", "classifier"),
    *("license", "description", "origin_url", "paper_name", "paper_ids", "notes"),
    *("hf_hub_id", "custom_load"),
}


def check_timm(name: object, arguments: object) -> None:
    """Raises ValueError unless an architecture and its arguments are timm's own, and plain values.

    Args:
        name: Name of the architecture.
        arguments: By name, as JSON has them.
    """
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(
            f"architecture {name!r:.80} must be one of timm {timm.__version__}, by its plain name"
        )
    if not isinstance(arguments, Mapping):
        raise ValueError(f"model_args must be a JSON object, got {arguments!r:.80}")
    known = _known(name)
    for key, value in arguments.items():
        if key not in known:
            raise ValueError(f"model_args must be arguments of {name}, got {key!r:.80}")
        _check_plain(key, value)


def preprocessing(facts: object) -> dict[str, Any]:
    """The entries of a ``pretrained_cfg`` that open no file.

    Raises:
        ValueError: It is no JSON object.
    """
    if not isinstance(facts, Mapping):
        raise ValueError(f"pretrained_cfg must be a JSON object, got {facts!r:.80}")
    return {key: value for key, value in facts.items() if key in FACTS}


def _known(name: str) -> set[str]:
    """Names of the arguments of an architecture."""
    module = sys.modules[timm.models.model_entrypoint(name).__module__]
    found = set(COMMON)
    for kind in vars(module).values():
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            if kind.__module__.startswith("timm."):
                found |= set(inspect.signature(kind.__init__).parameters)
    return found - CODE


def _check_plain(key: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        for part in value:
            _check_plain(key, part)
    elif isinstance(value, str) and any(sign in value for sign in "/\\:"):
        raise ValueError(f"model_args: {key} must be a plain word, got {value!r:.80}")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(f"model_args: {key} must be a number, a word or a list, got {value!r:.80}")
