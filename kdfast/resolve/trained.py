# SPDX-License-Identifier: Apache-2.0
"""Trained weights of timm and torchvision: their file in a cache, or the host that has them.

Without a network the libraries try for a minute. Asked first, the answer takes seconds.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import timm
import torch
import torchvision
from huggingface_hub import constants, try_to_load_from_cache

from kdfast.resolve.error import SourceError
from kdfast.resolve.near import TORCHVISION

# Seconds that a host may take to answer at all.
PATIENCE = 5.0
# Names of a model's weights on the hub, as timm looks for them.
FILES = ("model.safetensors", "pytorch_model.bin")


def find_trained(name: str, flag: str) -> Path | None:
    """The file with a model's trained weights, or None where they are to be downloaded.

    Args:
        name: timm's name, or ``torchvision:NAME``; the library must have this model.
        flag: The option that names it, for messages.

    Raises:
        SourceError: There are none, or they are neither here nor can they be downloaded.
    """
    if name.startswith(TORCHVISION):
        url = _torchvision_url(name)
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
        if not cached.is_file():
            _require_host(url, name, flag, f"TORCH_HOME={Path(torch.hub.get_dir()).parent}")
        # torchvision takes its own cache without asking the host.
        return None
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise SourceError(f"{flag}: timm has no pretrained weights of {name}")
    if not config.hf_hub_id:
        return None
    for file in (config.hf_hub_filename,) if config.hf_hub_filename else FILES:
        found = try_to_load_from_cache(config.hf_hub_id, file)
        if isinstance(found, str):
            return Path(found)
    _require_host(constants.ENDPOINT, name, flag, f"HF_HOME={constants.HF_HOME}")
    return None


def _torchvision_url(name: str) -> str:
    weights = torchvision.models.get_model_weights(name.removeprefix(TORCHVISION))
    url: str = weights.DEFAULT.url
    return url


def _require_host(url: str, name: str, flag: str, cache: str) -> None:
    """Raises SourceError unless the host of ``url`` answers; proxies are obeyed."""
    parts = urlsplit(url)
    reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else _asked(parts)
    if reason:
        raise SourceError(
            f"{flag}: trained weights of {name} are not in the cache, and {parts.netloc} cannot be "
            f"reached ({reason}); name a file of weights, or copy the cache of a machine that has "
            f"them to {cache}"
        )


def _asked(parts: SplitResult) -> str:
    """Why a host does not answer; empty where it does."""
    url = f"{parts.scheme}://{parts.netloc}"
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=PATIENCE):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answers, if only to refuse this question
    except OSError as error:
        return str(getattr(error, "reason", error))
