# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of a saved folder: for people; nothing here reads it again.

A card carries a checksum of its own text. One that somebody edited, or wrote, has none that fits,
and is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._version import __version__
from kdfast.pruning.adapter import Anatomy
from kdfast.pruning.architecture import build
from kdfast.pruning.families import anatomy_of

CARD = "README.md"
_MARK = re.compile(r"<!-- kdfast-card ([0-9a-f]{64}) -->\n\Z")
# Libraries by families of models; those of the others are of transformers.
NAMES = {"EVAViT": "kdfast", "timm": "timm", "torchvision": "torchvision"}


def is_foreign(path: Path) -> bool:
    """Whether a file is there that kdfast did not write as it is now."""
    if not path.is_file():
        return path.exists()
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError:
        return True
    found = _MARK.search(text)
    return found is None or found[1] != _digest(text[: found.start()])


def model_card(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Iterable[Tensor],
    metrics: Mapping[str, float | str],
) -> str:
    """The text of a card.

    Args:
        model: What is saved.
        config: Content of its config.json.
        tensors: What model.safetensors holds.
        metrics: What is known about the model, by name.
    """
    name, family = _name(config), config["kdfast"]["family"]
    library = NAMES.get(family, "transformers")
    whole, held = _whole(config), anatomy_of("save_pretrained", model)
    before, after = _sizes(whole), _sizes(held.model)
    pruned = before != after
    title = f"{name}, pruned" if pruned else name
    parts = [
        _front(library, pruned),
        f"# {title}\n\nArchitecture: `{name}` of {library}. Saved by kdfast {__version__}."
        f"{_removed(config)}",
        _table(("", f"`{name}`", "this model"), _rows(before, after, list(tensors))),
        _blocks(held),
        _loading(config),
        _metrics(metrics),
        "## Licence\n\nkdfast is under Apache-2.0. It claims no licence for these weights: they "
        "stay under the terms\nof the model that they were made from, and of the data that this "
        "one was trained on.",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n\n"
    return f"{text}<!-- kdfast-card {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _name(config: Mapping[str, Any]) -> str:
    named = config.get("architecture") or config["kdfast"]["class"]
    return _plain(str(named))


def _plain(text: str) -> str:
    """A text that stays within one cell of a table."""
    return re.sub(r"[\s|`<>]+", " ", text).strip()


def _whole(config: Mapping[str, Any]) -> nn.Module:
    """The architecture before anything was removed, without memory."""
    section = {key: config["kdfast"][key] for key in ("family", "class")}
    arguments = config.get("model_args")
    if section["family"] == "EVAViT" and arguments is not None:
        kept = {k: v for k, v in arguments.items() if k not in ("heads", "mlp_hidden")}
        config = {**config, "model_args": kept}
    with torch.device("meta"):
        return build({**config, "kdfast": section})


def _sizes(model: nn.Module) -> dict[str, int]:
    anatomy = anatomy_of("save_pretrained", model)
    return {
        "attention heads": sum(len(site.held) for site in anatomy.attentions),
        "hidden units of MLPs": sum(len(site.held) for site in anatomy.mlps),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _front(library: str, pruned: bool) -> str:
    """Front matter as Hugging Face reads it; JSON values are YAML."""
    tags = ["kdfast", "vision-transformer", library, *(["pruned"] if pruned else [])]
    tags = list(dict.fromkeys(tags))
    return f"---\nlibrary_name: kdfast\ntags: {json.dumps(tags)}\n---"


def _removed(config: Mapping[str, Any]) -> str:
    blocks = config["kdfast"].get("constant")
    if not blocks:
        return ""
    return f" {len(blocks)} of its layers were replaced by the constants that they gave."


def _rows(
    before: Mapping[str, int], after: Mapping[str, int], tensors: Sequence[Tensor]
) -> list[tuple[str, str, str]]:
    rows = [(name, f"{before[name]:,}", f"{after[name]:,}") for name in before]
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors if x.is_floating_point()})
    size = sum(x.nbytes for x in tensors) / 1e6
    return [*rows, ("model.safetensors", "", f"{size:.1f} MB, {', '.join(dtypes)}")]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _blocks(held: Anatomy) -> str:
    """What every block has, where blocks differ."""
    heads = [len(site.held) for site in held.attentions]
    units = [len(site.held) for site in held.mlps]
    lines = [
        f"{what} of each block: {', '.join(map(str, counts))}"
        for what, counts in (("Heads", heads), ("Hidden units", units))
        if len(set(counts)) > 1
    ]
    return "\\\n".join(lines)


def _loading(config: Mapping[str, Any]) -> str:
    text = (
        "## Load\n\n"
        "```python\n"
        "import kdfast\n\n"
        'model = kdfast.load_pretrained("path/to/this/folder")  # in eval mode, on the CPU\n'
        "```\n\n"
        "The original model is not needed, and no code of this folder is run. `config.json` names "
        "the heads\nand units that are left."
    )
    data = config.get("pretrained_cfg") or {}
    if {"input_size", "mean", "std"} <= set(data):
        mean, std = _numbers(data["mean"]), _numbers(data["std"])
        text += f" Images are {_side(config)},\nmean {mean}, std {std}."
    return text


def _side(config: Mapping[str, Any]) -> str:
    """Height and width of timm's images; those of the weights' names may be others."""
    size = config.get("model_args", {}).get("img_size") or config["pretrained_cfg"]["input_size"]
    sides = [size, size] if isinstance(size, int) else size[-2:]
    return " x ".join(map(str, sides))


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _metrics(metrics: Mapping[str, float | str]) -> str:
    if not metrics:
        return ""
    rows = [
        (_plain(name), f"{value:.6g}" if isinstance(value, float) else _plain(str(value)))
        for name, value in metrics.items()
    ]
    return f"## Metrics\n\n{_table(('metric', 'value'), rows)}"
