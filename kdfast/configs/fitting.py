# SPDX-License-Identifier: Apache-2.0
"""Defaults that follow from what the user set, and from the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdfast.configs.chain import ChainConfig
from kdfast.configs.recovery import Config

_PER_LINK = ("model_args", "init", "batch", "epochs")


def fit_chain(values: dict[str, Any], user: Mapping[str, Any]) -> None:
    """Changes a chain's defaults where the user set others that they belong to.

    Lists with an entry for each link get the length of the user's chain: a model of the default
    chain keeps its entries; another one has no ``model_args``, and batch, epochs and init of the
    default link in its place. The default folder is that of the default kind of data.

    Args:
        values: The plain config with its defaults.
        user: What the user sets, by dotted key.
    """
    chain = user.get("chain")
    if isinstance(chain, list) and chain:
        for key in _PER_LINK:
            if key not in user and isinstance(values[key], list) and values[key]:
                values[key] = _fitted(key, values[key], values["chain"], chain)
    data = values["data"]
    if user.get("data.kind", data["kind"]) != data["kind"] and "data.root" not in user:
        data["root"] = None


def _fitted(key: str, entries: list[Any], models: list[str], chain: list[Any]) -> list[Any]:
    if len(entries) != len(models):
        return entries
    last, steps = len(models) - 1, max(1, len(chain) - 1)
    found = []
    for place, model in enumerate(chain):
        if model in models:
            found.append(entries[models.index(model)])
        else:
            found.append({} if key == "model_args" else entries[round(place * last / steps)])
    return found


def with_precision(config: Config | ChainConfig) -> Config | ChainConfig:
    """The config with ``auto`` replaced: bf16 on a GPU that has it, fp32 everywhere else.

    CPUs keep fp32: few have instructions for bf16, and without them it is slower.
    """
    if isinstance(config, ChainConfig):
        if config.precision != "auto":
            return config
        return replace(config, precision=_precision(config.device))
    if config.run.precision != "auto":
        return config
    return replace(config, run=replace(config.run, precision=_precision(config.run.device)))


def _precision(device: str) -> Any:
    # Imported here: it takes seconds, and the help of a command needs configs without it.
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
