# SPDX-License-Identifier: Apache-2.0
"""Folders of Hugging Face transformers: the library builds the model, but opens no file itself."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.machine.bounded import bounded, check_counts
from kdfast.machine.weights import weight_problems
from kdfast.models.image_processor import FILES, KEPT, check_pictures, pictures_of
from kdfast.pruning.architecture import transformers_class
from kdfast.pruning.folder import (
    CONFIG,
    Weights,
    check_fit,
    described_by,
    inside,
    read_config,
    read_json,
    read_weights,
)

# With these transformers reads another model, or code, from wherever the file says.
FORBIDDEN = {
    *("auto_map", "transformers_weights", "quantization_config", "backbone", "custom_pipelines"),
    *("use_pretrained_backbone", "use_timm_backbone", "kernel_config", "base_model_name_or_path"),
}
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "kdfast")


def check_transformers(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of transformers without what makes it open other files.

    Raises:
        ValueError: It asks for that.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"load_pretrained: {folder} holds an adapter, which belongs to a model elsewhere; "
            f"merge it and save the whole model"
        )
    check_pictures(config.get(KEPT))
    kept: dict[str, Any] = _without_files(folder / CONFIG, config)
    return kept


def _without_files(path: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_without_files(path, part) for part in value]
    if not isinstance(value, Mapping):
        return value
    for name in FORBIDDEN & set(value):
        if value[name]:
            raise ValueError(
                f"load_pretrained: {path} must describe the model itself, got {name}, with which "
                f"transformers opens other files"
            )
    for name in ("attn_implementation", "_attn_implementation"):
        if value.get(name) not in (None, *ATTENTION):
            raise ValueError(
                f"load_pretrained: {path}: {name} must be of {', '.join(ATTENTION)}, "
                f"got {value[name]!r:.80}"
            )
    dropped = {*FORBIDDEN, "_name_or_path", "_commit_hash"}
    return {k: _without_files(path, part) for k, part in value.items() if k not in dropped}


def of_transformers(folder: Path, config: Mapping[str, Any], weights: Weights) -> Any:
    """The model of the class that a configuration names.

    Raises:
        ValueError: The configuration describes none, or the tensors do not fit it.
    """
    with described_by(folder / CONFIG):
        names = config["architectures"]
        kind = transformers_class(names[0] if isinstance(names, list) and names else names)
        parsed = kind.config_class.from_dict(check_transformers(folder, config))
    return _filled(folder, kind, parsed, weights, ())


def load_transformers(folder: Path) -> Any:
    """The model of a folder that transformers wrote; None where something else wrote it.

    One that classifies images comes with its classifier, of others the backbone: heads of other
    tasks are of no use here.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: transformers is.
        ValueError: A file is damaged, describes no model of transformers, or does not fit.
    """
    config = read_config(folder)
    if "kdfast" in config or "architecture" in config or "model_type" not in config:
        return None
    names = config.get("architectures")
    kind = names[0] if isinstance(names, list) and names else names
    if not str(kind).endswith("ForImageClassification"):
        return load_headless(folder)
    weights = read_weights(folder, pickled=True)
    with described_by(folder / CONFIG):
        check_counts(config, weights.size)
    return of_transformers(folder, config, weights)


def load_headless(folder: Path) -> Any:
    """The backbone of a folder that transformers wrote, whatever task its head is for.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: transformers is.
        ValueError: A file is damaged, describes no model of transformers, or does not fit.
    """
    auto = importlib.import_module("transformers.models.auto")
    config, weights = read_config(folder), read_weights(folder, pickled=True)
    with described_by(folder / CONFIG):
        check_counts(config, weights.size)
        if config.get("model_type") not in auto.CONFIG_MAPPING:
            raise ValueError(f"model_type {config.get('model_type')!r:.80} is not known")
        own = check_transformers(folder, config)
        parsed = auto.CONFIG_MAPPING[config["model_type"]].from_dict(own)
        parsed._attn_implementation = "sdpa"
        kind = auto.MODEL_MAPPING[type(parsed)]
    # Heads of a task have no pooler; nothing here looks at it.
    return _filled(folder, kind, parsed, weights, ("missing: pooler.",))


def _filled(
    folder: Path, kind: Any, config: Any, weights: Weights, unneeded: tuple[str, ...]
) -> Any:
    """A model none of whose tensors are random, but those that are not needed."""
    with described_by(folder / CONFIG), bounded(weights.size), torch.device("meta"):
        kind(copy.deepcopy(config))
    with described_by(folder / CONFIG):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights.tensors),
            ignore_mismatched_sizes=True,  # they are listed then
            output_loading_info=True,
        )
    check_fit(folder, [line for line in unfilled(info) if not line.startswith(unneeded)])
    check_fit(folder, weight_problems(weights.tensors, _kinds(weights, model)))
    _keep_pictures(folder, model)
    return model.eval()


def _keep_pictures(folder: Path, model: Any) -> None:
    """Makes what the folder says of the model's pictures a part of its configuration."""
    for name in FILES:
        if (folder / name).is_file():
            path = inside(folder, name)
            try:
                found = pictures_of(read_json(path))
            except ValueError as error:
                text = str(error).removeprefix("load_pretrained: ")
                raise ValueError(f"load_pretrained: {path}: {text}") from error
            setattr(model.config, KEPT, found)
            return


def _kinds(weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """For each tensor of a file one of the model's kind: whole numbers where buffers have them.

    The library gives some tensors other names, but leaves the last word of those.
    """
    whole = {
        name.rpartition(".")[2]: buffer
        for name, buffer in model.named_buffers()
        if not buffer.is_floating_point()
    }
    some = torch.empty(0)
    return {name: whole.get(name.rpartition(".")[2], some) for name in weights.tensors}


def unfilled(info: Mapping[str, Any]) -> list[str]:
    """The tensors that transformers left random, by what its ``from_pretrained`` reports."""
    problems = [f"missing: {name}" for name in sorted(info.get("missing_keys", ()))]
    return problems + [f"of another shape: {x}" for x in sorted(info.get("mismatched_keys", ()))]
