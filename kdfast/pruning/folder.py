# SPDX-License-Identifier: Apache-2.0
"""Files of a saved model's folder: read as data, and none outside of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdfast.machine.bounded import Size
from kdfast.machine.files import load_torch
from kdfast.machine.limits import MAX_TEXT
from kdfast.machine.weights import digest_problem

# Problems that a message lists.
SHOWN = 20
CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"


class Weights(NamedTuple):
    """What a folder's weights are.

    Attributes:
        tensors: By name, shared ones under each of their names.
        metadata: Text beside them.
        size: For the limits of what they may describe.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    size: Size


def read_config(folder: Path) -> dict[str, Any]:
    """Content of config.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no JSON object of finite values, too long, or outside of the folder.
    """
    return read_json(inside(folder, CONFIG))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of finite numbers.

    Raises:
        ValueError: It is something else, or too long.
    """
    size, limit = path.stat().st_size, MAX_TEXT()
    if size > limit:
        raise ValueError(
            f"load_pretrained: {path} must have at most {limit:,} bytes ({MAX_TEXT.name} changes "
            f"that), got {size:,}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_pretrained: {path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"load_pretrained: {path} must be a JSON object")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"numbers must be finite, got {name}")


def inside(folder: Path, name: object) -> Path:
    """A file of a folder by its plain name.

    A link counts as the file where it leads to another file of the folder, or to the ``blobs`` of
    the Hugging Face cache that the folder is part of.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The name is a path, or a link that leads elsewhere.
    """
    if not isinstance(name, str) or not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"load_pretrained: {folder} must name its own files, got {name!r:.80}")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"load_pretrained: {folder} must hold {name}, got none")
    home, target = folder.resolve(), path.resolve()
    homes = [home] + [home.parent.parent / "blobs"] * (home.parent.name == "snapshots")
    if target.parent not in homes:
        raise ValueError(
            f"load_pretrained: {path} must lie in its folder, but is a link to {target}; replace "
            f"it by the file"
        )
    return path


def read_weights(folder: Path, *, pickled: bool = False) -> Weights:
    """All tensors of a folder: of model.safetensors, or else of the files that its index names.

    Args:
        folder: The folder.
        pickled: Take pytorch_model.bin where there is nothing else; no code of it is run.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, of another kind, or outside of the folder.
    """
    if (folder / WEIGHTS).is_file():
        return read_safetensors(inside(folder, WEIGHTS))
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if pickled and (folder / PICKLED).is_file():
        path = inside(folder, PICKLED)
        state = load_torch(path)
        if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
            raise ValueError(f"{path} must hold a state dict")
        tensors = {str(name): tensor for name, tensor in state.items()}
        return Weights(tensors, {}, Size(path, path.stat().st_size, len(tensors)))
    return read_safetensors(inside(folder, WEIGHTS))


def _read_shards(folder: Path) -> Weights:
    path = inside(folder, INDEX)
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(f"load_pretrained: {path} must have a weight_map of file names")
    tensors: dict[str, Tensor] = {}
    total = 0
    for name in sorted(set(places.values())):
        shard = read_safetensors(inside(folder, name))
        tensors |= shard.tensors
        total += shard.size.bytes
    if lost := sorted(set(places) - set(tensors)):
        raise ValueError(f"load_pretrained: {path} names tensors that no file holds: {lost[:5]}")
    return Weights(tensors, {}, Size(path, total, len(tensors)))


def read_safetensors(path: Path) -> Weights:
    """Copies of the tensors of a file: it may change or go while they live.

    Raises:
        ValueError: It is damaged, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            metadata = dict(file.metadata() or {})
        aliases = json.loads(metadata.get("aliases", "{}"))
    except (SafetensorError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(
            f"load_pretrained: {path} must be a whole safetensors file: {error}"
        ) from error
    if problem := digest_problem(tensors, metadata):
        raise ValueError(f"load_pretrained: {path}: {problem}; copy or save the model again")
    if not isinstance(aliases, dict) or not all(isinstance(x, str) for x in aliases.values()):
        raise ValueError(f"load_pretrained: {path}: aliases must be names, got {aliases!r:.80}")
    if missing := sorted(set(aliases.values()) - set(tensors)):
        raise ValueError(f"load_pretrained: {path} must hold the shared tensors {missing}")
    size = Size(path, path.stat().st_size, len(tensors) + len(aliases))
    return Weights(
        {**tensors, **{name: tensors[source] for name, source in aliases.items()}}, metadata, size
    )


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """Turns what any value of a configuration leads to into a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # constructors of libraries stumble over whatever comes
        text = str(error).removeprefix("load_pretrained: ")
        if not isinstance(error, ValueError):
            text = f"{type(error).__name__}: {text}"
        raise ValueError(f"load_pretrained: {path} must describe a model: {text}") from error


def check_fit(folder: Path, problems: list[str]) -> None:
    """Raises ValueError, which lists the problems of a folder's weights, if there are any."""
    if problems:
        more = [f"and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
        raise ValueError(
            f"load_pretrained: {folder / WEIGHTS} must fit the architecture, got\n  "
            + "\n  ".join([*problems[:SHOWN], *more])
        )
