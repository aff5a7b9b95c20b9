# SPDX-License-Identifier: Apache-2.0
"""Models of Hugging Face's hub: their folder in its cache, downloaded where it is not there yet."""

from __future__ import annotations

import re
from pathlib import Path

from kdfast.models import image_processor
from kdfast.pruning.folder import CONFIG, INDEX, PICKLED, WEIGHTS
from kdfast.resolve.error import SourceError

# Pickled weights are asked for only where a model has no others.
FILES = [CONFIG, WEIGHTS, INDEX, "model-*.safetensors", *image_processor.FILES]


def hub_folder(name: str, flag: str) -> Path:
    """The folder with configuration and weights of ``owner/model``, or ``owner/model@revision``.

    Args:
        name: As on the hub.
        flag: The option that names it, for messages.

    Raises:
        SourceError: It is neither in the cache nor can it be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name) is None or name.startswith("."):
        raise SourceError(f"{flag}: there is no folder {name}")
    repository, _, revision = name.partition("@")
    for local in (True, False):
        try:
            for patterns in (FILES, [*FILES, PICKLED]):
                folder = Path(
                    snapshot_download(
                        repository,
                        revision=revision or None,
                        allow_patterns=patterns,
                        local_files_only=local,
                    )
                )
                if _whole(folder):
                    return folder
        except Exception as error:  # of whichever HTTP library the hub's client stands on
            # No ValueError: what is not in the cache is one for older clients.
            if not local or isinstance(error, HFValidationError):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise SourceError(
                    f"{flag}: hf:{name} is no folder, not in the cache of Hugging Face, and cannot "
                    f"be downloaded ({reason}); without a network, copy {CONFIG} and {WEIGHTS} "
                    "into a folder and name that"
                ) from error
    raise SourceError(f"{flag}: hf:{name} must hold {CONFIG} and {WEIGHTS}, has neither of both")


def _whole(folder: Path) -> bool:
    weights = any((folder / name).is_file() for name in (WEIGHTS, INDEX, PICKLED))
    return weights and (folder / CONFIG).is_file()
