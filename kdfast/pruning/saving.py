# SPDX-License-Identifier: Apache-2.0
"""Saves any model that kdfast can prune, and loads it without the original.

See docs/use/pruning.md.

A folder with ``model.safetensors`` and ``config.json``. The latter is what timm or Hugging Face
writes itself, plus a section "kdfast" with the kept heads and MLP widths. ``README.md`` is a model
card, for people.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdfast._version import __version__
from kdfast.machine.bounded import bounded, check_counts
from kdfast.machine.disk import require_room
from kdfast.machine.files import replacing_files
from kdfast.machine.weights import DIGEST, not_finite, tensors_digest, weight_problems
from kdfast.models.eva import EVAViT
from kdfast.pruning.architecture import (
    build,
    described,
    differences,
    set_tables,
)
from kdfast.pruning.card import CARD, is_foreign, model_card
from kdfast.pruning.folder import (
    CONFIG,
    WEIGHTS,
    Weights,
    check_fit,
    described_by,
    read_config,
    read_weights,
)
from kdfast.pruning.hf_folder import check_transformers, of_transformers
from kdfast.pruning.not_a_folder import not_a_folder


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    model_args: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float | str] | None = None,
) -> Path:
    """Writes a model, pruned or not, into a folder that ``load_pretrained`` reads.

    The files appear under their names when all are complete, the configuration last: a folder that
    has one holds one whole model.

    Args:
        model: EVAViT, or a model of timm, torchvision or Hugging Face that kdfast can prune.
        path: Folder; it is made if missing, files of the same names are replaced, but no README.md
            that another hand wrote or changed.
        model_args: JSON values for the architecture's constructor, where timm did not record them.
        metrics: What is known about the model, such as ``{"top-1, %": 81.2}``, for its card.

    Returns:
        The folder.

    Raises:
        TypeError: The model's family is not known, or cannot be pruned.
        ValueError: The model is not what its configuration builds; the message says what differs.
    """
    config = described(model, model_args or {})
    if bad := [name for name, x in model.state_dict().items() if _is_bad(x)]:
        raise ValueError(f"save_pretrained: tensors must be finite, got others in {bad[:5]}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _tensors(model)
    metadata = {
        "format": "pt",
        "kdfast": __version__,
        "aliases": json.dumps(aliases),
        CONFIG: config_digest(config),
    }
    metadata[DIGEST] = tensors_digest(tensors, metadata)
    require_room(folder / WEIGHTS, sum(tensor.nbytes for tensor in tensors.values()))
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    card = model_card(model, config, tensors.values(), metrics or {})
    with replacing_files(folder, last=CONFIG) as staged:
        save_file(tensors, staged / WEIGHTS, metadata)
        (staged / CONFIG).write_text(text, encoding="utf-8")
        if not is_foreign(folder / CARD):
            (staged / CARD).write_text(card, encoding="utf-8")
    return folder


def load_pretrained(path: str | os.PathLike[str], *, verify: bool = True) -> Any:
    """Builds the model of a folder, on the CPU and in eval mode. No code of the folder is run.

    Nothing outside of the folder is opened, whatever its files say, and what they describe is
    limited by the size of the weights; see docs/internals/reliability.md.

    Args:
        path: Folder of ``save_pretrained``, or one in the layout of timm or Hugging Face with
            ``model.safetensors``.
        verify: Whether config.json must be what ``save_pretrained`` wrote beside the weights;
            False for one that was edited.

    Returns:
        The model with the kept heads and hidden units; types of tensors are those of the file.

    Raises:
        FileNotFoundError: The folder or one of its two files is missing.
        ValueError: A file is damaged or of another kind, the architecture is not known here, or the
            tensors do not fit it; one message lists all that is wrong.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(not_a_folder(str(path)))
    config, weights = read_config(folder), read_weights(folder)
    if verify:
        _check_pair(folder, config, weights)
    with described_by(folder / CONFIG):
        check_counts(config, weights.size)
    if "kdfast" not in config and config.get("architectures"):
        # The library knows the names that its older versions gave to tensors.
        return of_transformers(folder, config, weights)
    return _of_kdfast(folder, check_transformers(folder, config), weights)


def _check_pair(folder: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Raises ValueError if weights of ``save_pretrained`` lie beside another configuration."""
    if weights.metadata.get(CONFIG, digest := config_digest(config)) != digest:
        raise ValueError(
            f"load_pretrained: {folder / CONFIG} is damaged or was edited: it is not the one that "
            f"was saved with {WEIGHTS}; copy or save the model again, or pass verify=False"
        )


def _of_kdfast(folder: Path, config: dict[str, Any], weights: Weights) -> Any:
    """The model of a configuration that ``described`` made, or of timm's own."""
    state = weights.tensors
    with described_by(folder / CONFIG), bounded(weights.size):
        # Without memory first: what does not fit the tensors is never built.
        with torch.device("meta"):
            plan = build(config)
    own = plan.state_dict()
    wanted = {name: tuple(t.shape) for name, t in own.items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    check_fit(folder, [*differences(found, wanted), *weight_problems(state, own)])
    with described_by(folder / CONFIG):
        model = build(config)
        model.load_state_dict(_as_parameters(state, model), strict=True, assign=True)
        if isinstance(model, EVAViT):
            model.fill_rope()
        set_tables(model, config.get("kdfast", {}).get("tables", {}))
    return model.eval()


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration's values, however they are laid out."""
    # As it is read again: keys that are no text become text.
    read = json.loads(json.dumps(config))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(not_finite(tensor))


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, and the other names of shared ones."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        copy = tensor.detach().cpu().contiguous()
        # Two views of one memory are two tensors in the file.
        whole = copy.untyped_storage().nbytes() == copy.numel() * copy.element_size()
        tensors[name] = copy if whole else copy.clone()
    return tensors, aliases


def _as_parameters(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Parameters where the model has parameters, the same one for a tensor of several names."""
    made: dict[int, Tensor] = {}
    for name, own in model.state_dict(keep_vars=True).items():
        tensor = state[name]
        is_parameter = isinstance(own, nn.Parameter)
        if id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(tensor, own.requires_grad) if is_parameter else tensor
    return {name: made[id(tensor)] for name, tensor in state.items()}
