# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.rivals --save FILE`: whole models by `kdfast compare`, one after the other.

Each way of running a model has a process of its own, so that no library waits for the threads of
another. FILE belongs into bench/results, as FAMILY_rivals.json; README.md and docs show it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import kdfast.compare
from bench.rows import rounded
from kdfast.machine.files import write_text

MODELS = {
    "DeiT-S": "deit_small_patch16_224",
    "ViT-B": "vit_base_patch16_224",
    "EVA02-S": "eva02_small_patch14_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "SigLIP-B": "vit_base_patch16_siglip_224",
}
NAMES = ("eager", "onnx", "openvino", "kdfast", "eager-bf16", "openvino-bf16", "kdfast-bf16")
REQUEST = ("--prune", "0", "--only", ",".join(NAMES))
FIELDS = ("name", "ms", "p95_ms", "cosine", "reason")


def measured(model: str) -> dict[str, Any]:
    """What ``kdfast compare`` wrote of a timm model.

    Raises:
        RuntimeError: It ended without a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        status = kdfast.compare.main(["--model", model, "--out", folder, *REQUEST])
        if status:
            raise RuntimeError(f"kdfast compare --model {model} must end with 0, got {status}")
        found: dict[str, Any] = json.loads((Path(folder) / "compare.json").read_text("utf-8"))
    return found


def row(candidate: dict[str, Any]) -> dict[str, Any]:
    """What a result file keeps of a candidate: FIELDS that it has, and its memory."""
    kept = {name: candidate[name] for name in FIELDS if candidate[name] not in (None, "")}
    if candidate["memory_bytes"] is not None:
        kept["memory_mib"] = candidate["memory_bytes"] >> 20
    return rounded(kept)


def main(argv: list[str] | None = None) -> None:
    """Compares every model, and writes the file."""
    p = argparse.ArgumentParser(prog="python -m bench.rivals", description=__doc__)
    p.add_argument("--save", type=Path, required=True, metavar="FILE")
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    options = p.parse_args(argv)
    models, machine = {}, {}
    for name in options.models:
        found = measured(MODELS[name])
        machine = found["machine"]
        models[name] = [row(candidate) for candidate in found["rows"]]
    write_text(options.save, content(machine, models))
    print(options.save)


def content(machine: dict[str, Any], models: dict[str, list[dict[str, Any]]]) -> str:
    """The file's text, a row a line."""
    command = f"python -m kdfast.compare --model MODEL {' '.join(REQUEST)}"
    parts = []
    for name, rows in models.items():
        lines = ",\n".join(f"   {json.dumps(row)}" for row in rows)
        parts.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
    facts = f' "machine": {json.dumps(machine)},\n "command": {json.dumps(command)},\n'
    return "{\n" + facts + ' "models": {\n' + ",\n".join(parts) + "\n }\n}\n"


if __name__ == "__main__":
    main()
