# SPDX-License-Identifier: Apache-2.0
"""Edited folders of models: other values in their JSON, other tensors, links that lead away."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kdfast
from kdfast.testing.damage.models import saved
from kdfast.testing.damage.tally import BAIT, OUTSIDE, Tally, put, taken

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What takes the place of any value.
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 3, 10**7, 2**40, 10**30, -1e308, 0.5, "", "x", [], {}, [[]], [-1]),
    *([1, 1], [0, 99], {"a": {"b": 1}}, f"../{BAIT}", OUTSIDE, f"hf-hub:{BAIT}/{BAIT}"),
]
# What is added to any object.
EXTRA: dict[str, Any] = {
    "pretrained": True,
    "checkpoint_path": OUTSIDE,
    "pretrained_cfg": {"file": OUTSIDE},
    "pretrained_cfg_overlay": {"file": OUTSIDE},
    "file": OUTSIDE,
    "url": f"file://{OUTSIDE}",
    "cache_dir": OUTSIDE,
    "auto_map": {"AutoModel": f"{BAIT}.Model"},
    "transformers_weights": f"../{BAIT}",
    "quantization_config": {"quant_method": "gptq", "tokenizer": BAIT},
    "attn_implementation": f"{BAIT}/kernels",
    "_attn_implementation": f"{BAIT}/kernels",
    "_name_or_path": f"../{BAIT}",
    "use_timm_backbone": True,
    "backbone": BAIT,
    "attributes": {"": {"forward": "x", "training": "x"}},
    "depth": 10**5,
    "num_hidden_layers": 10**5,
    "num_classes": 10**9,
    "num_labels": 10**9,
    "device": "cuda",
}


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to every value of a JSON tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(tree: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy of a JSON tree with one change, and what that is."""
    tree = copy.deepcopy(tree)
    *way, last = draw.choice(list(places(tree)))
    owner = tree
    for key in way:
        owner = owner[key]
    name = ".".join(map(str, [*way, last]))
    what = draw.randrange(4)
    if what == 0:
        del owner[last]
        return tree, f"{name} taken away"
    if what == 1 and isinstance(owner, dict):
        key = draw.choice(sorted(EXTRA))
        owner[key] = EXTRA[key]
        return tree, f"{'.'.join(map(str, [*way, key]))} = {EXTRA[key]!r} added"
    owner[last] = draw.choice(VALUES)
    return tree, f"{name} = {owner[last]!r}"


def edited_json(tally: Tally, root: Path, name: str, count: int, draw: random.Random) -> None:
    """Changes config.json of a folder ``count`` times."""
    for foreign in (False, True) if name in ("timm", "transformers") else (False,):
        folder = root / f"{name} {foreign}"
        saved(name, folder, foreign=foreign)
        files = taken(folder)
        config = json.loads(files[CONFIG])
        for _ in range(count):
            tree, text = changed(config, draw)
            put(folder, {CONFIG: json.dumps(tree).encode()})
            for verify in (True, False):
                tally.trial(
                    f"config.json, {'its library' if foreign else 'kdfast'}",
                    f"{name}, verify={verify}: {text}",
                    partial(kdfast.load_pretrained, folder, verify=verify),
                    partial(_not_of, folder),
                    str(folder),
                )
        shutil.rmtree(folder)


def _not_of(folder: Path, model: Any) -> str | None:
    """Whether a model's tensors are not those of its file."""
    wanted = [_bytes(tensor) for tensor in load_file(folder / WEIGHTS).values()]
    found = {name: _bytes(tensor) for name, tensor in model.state_dict().items()}
    if drawn := [name for name, data in found.items() if data not in wanted]:
        return f"{drawn[0]} is not in the file"
    return None if set(wanted) <= set(found.values()) else "a tensor of the file is not in it"


def _bytes(tensor: Tensor) -> bytes:
    # The library that loads it may give it another name.
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_edits() -> dict[str, Callable[[dict[str, Tensor], str], None]]:
    """Changes of one tensor of a state dict, in place."""

    def to(dtype: torch.dtype) -> Callable[[dict[str, Tensor], str], None]:
        return lambda state, name: state.update({name: state[name].to(dtype)})

    def with_one(value: float) -> Callable[[dict[str, Tensor], str], None]:
        def change(state: dict[str, Tensor], name: str) -> None:
            state[name] = state[name].clone()
            state[name].view(-1)[0] = value

        return change

    return {
        "complex64": to(torch.complex64),
        "float8_e4m3fn": to(torch.float8_e4m3fn),
        "float8_e5m2": to(torch.float8_e5m2),
        "int64": to(torch.int64),
        "int8": to(torch.int8),
        "bool": to(torch.bool),
        "NaN": with_one(float("nan")),
        "inf": with_one(float("inf")),
        "-inf": with_one(float("-inf")),
        "missing": lambda state, name: state.__delitem__(name),
        "more": lambda state, name: state.update({f"{name}.more": state[name].clone()}),
        "empty": lambda state, name: state.update({name: state[name][:0].clone()}),
        "flat": lambda state, name: state.update({name: state[name].flatten().clone()}),
        "taller": lambda state, name: state.update({name: torch.cat([state[name]] * 2)}),
    }


def edited_tensors(tally: Tally, root: Path, name: str, count: int, draw: random.Random) -> None:
    """Writes the weights of a folder again with one tensor changed, ``count`` times."""
    folder = root / name
    saved(name, folder, foreign=name in ("timm", "transformers"))
    tensors = load_file(folder / WEIGHTS)
    edits = tensor_edits()
    for number in range(count):
        state = dict(tensors)
        what = list(edits)[number % len(edits)]
        key = draw.choice([name for name, x in state.items() if x.dim() and x.numel() > 1])
        edits[what](state, key)
        if what == "flat" and tensors[key].dim() == 1:
            continue
        if what == "more" and name == "transformers":  # it leaves out what the class has not
            continue
        save_file(state, folder / WEIGHTS, {"format": "pt"})
        tally.trial(
            "tensors",
            f"{name}: {key} {what}",
            lambda: kdfast.load_pretrained(folder, verify=False),
            lambda model: "it was loaded",
            str(folder),
        )
    shutil.rmtree(folder)


class Bait:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, (OUTSIDE,)


def hostile_files(tally: Tally, root: Path) -> None:
    """Links, indices, pickles and adapters in place of a folder's files."""
    bait = root / f"{BAIT}.safetensors"
    save_file({"x": torch.zeros(1)}, bait)
    pickled = pickle.dumps({"weight": Bait()})

    def trial(text: str, change: Callable[[Path], None]) -> None:
        folder = root / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        saved("transformers", folder, foreign=True)
        change(folder)
        tally.trial(
            "folders",
            text,
            lambda: kdfast.load_pretrained(folder),
            lambda model: "it was loaded",
            str(folder),
        )
        shutil.rmtree(folder)

    def linked(name: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / name).unlink()
            os.symlink(bait, folder / name)

        return change

    def index(name: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            names = list(load_file(folder / WEIGHTS))
            (folder / WEIGHTS).unlink()
            content = {"weight_map": {key: name for key in names}}
            (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))

        return change

    def written(name: str, data: bytes) -> Callable[[Path], None]:
        return lambda folder: put(folder, {name: data})

    for name in (CONFIG, WEIGHTS):
        trial(f"{name} is a link to another folder", linked(name))
    for name in (f"../{bait.name}", str(bait), OUTSIDE, "..", "", "missing.safetensors"):
        trial(f"the index names {name!r}", index(name))
    trial("weights are a pickle", written(WEIGHTS, pickled))
    trial("config.json is a pickle", written(CONFIG, pickled))
    trial("config.json is nested deeply", written(CONFIG, b'{"a":' * 10**5))
    trial("config.json has a number of many digits", written(CONFIG, b'{"a": ' + b"9" * 10**5))
    trial("config.json has an infinite number", written(CONFIG, b'{"depth": Infinity}'))
    trial("config.json is no text", written(CONFIG, bytes(range(256))))
    adapter = json.dumps({"base_model_name_or_path": f"../{BAIT}", "peft_type": "LORA"}).encode()
    trial("an adapter of another model", written("adapter_config.json", adapter))
    for name, data in {
        "the header is longer than the file": (2**40).to_bytes(8, "little") + b"{}",
        "the header is nested": (10**5 + 0).to_bytes(8, "little") + b"[" * 10**5,
        "no bytes": b"",
    }.items():
        trial(name, written(WEIGHTS, data))
    shutil.rmtree(root / "hostile", ignore_errors=True)
