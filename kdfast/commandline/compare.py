# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kdfast.commandline.models import MODEL_HELP
from kdfast.commandline.parser import Parser
from kdfast.machine.spelling import did_you_mean

DESCRIPTION = """Runs one model in every way that people pick for inference on a CPU, and says how
fast each is, what it takes and how far its answers are from the original's.

Every candidate runs in a process of its own with the same number of threads. The candidates are
timed in turns, so that a machine that slows down does so for all of them. Measured are

  median, p95   of single calls with one batch of pictures, with input conversion
  file          the weights as safetensors (torch, kdfast), or the runtime's files
  memory        the highest resident memory of the process while it answers,
                less what it took with all libraries and no model
  cosine        mean over pictures of that of its output and the original's
  top-1         share of the pictures that get the original's class

The pruned model is the original without a share of its heads, not trained afterwards: its agreement
says what distillation has to win back. Give a trained one by --pruned."""
EXAMPLES = (
    "kdfast compare --model deit_small_patch16_224 --pretrained --data my_pictures",
    "kdfast compare --model vit_small_half --only eager,openvino,kdfast --batch 8",
)
_BF16 = "model.to(torch.bfloat16)"
# The candidates, as ``kdfast.rivals`` has them.
CANDIDATES = {
    "eager": "PyTorch as it is, with its own attention",
    "eager-bf16": f"the same after {_BF16}",
    "compile": "torch.compile(model, dynamic=False)",
    "compile-bf16": f"the same after {_BF16}",
    "freezing": "torch.compile with inductor's freezing",
    "freezing-bf16": f"the same after {_BF16}",
    "onnx": "ONNX Runtime",
    "onnx-int8": "ONNX Runtime, quantize_static (QDQ, products only, calibrated on the pictures)",
    "onnx-int8-dynamic": "ONNX Runtime, quantize_dynamic (no calibration)",
    "openvino": "OpenVINO with INFERENCE_PRECISION_HINT=f32",
    "openvino-bf16": "the same with INFERENCE_PRECISION_HINT=bf16",
    "openvino-int8": "OpenVINO, nncf.quantize on the pictures",
    "kdfast": "kdfast.accelerate",
    "kdfast-bf16": f"the same after {_BF16}",
}
# Asked for by name only: each compiles as long as the others take together.
EXTRA = ("compile-bf16", "freezing-bf16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = "\n".join(f"  {name:<20}{about}" for name, about in CANDIDATES.items())
    made = Parser("compare", DESCRIPTION, EXAMPLES)
    made.epilog = (
        f"candidates (with --only and --skip):\n{known}\nWithout --only all but "
        f"{' and '.join(EXTRA)} run. OpenVINO and ONNX Runtime: pip install 'kdfast[bench]'.\n\n"
        f"{made.epilog}"
    )
    add = made.add_argument
    add("--model", required=True, metavar="NAME|DIR|FILE", help=MODEL_HELP)
    add("--checkpoint", metavar="FILE", help="weights for the name in --model")
    add("--pretrained", action="store_true", help="download the weights of --model")
    add("--data", type=Path, metavar="DIR", help="your pictures [rendered scenes]")
    add("--pictures", type=int, default=16, help="to agree on [16]")
    add("--prune", type=float, default=0.5, metavar="SHARE", help="of heads removed; 0: none [0.5]")
    add("--pruned", metavar="PATH", help="a pruned model, saved, in place of --prune")
    add("--batch", type=int, default=1, help="pictures of a call [1]")
    add("--threads", type=int, help="of every candidate [torch's]")
    add("--only", type=names, metavar="A,B", help="candidates, see below")
    add("--skip", type=names, metavar="A,B", default=[], help="candidates to leave out")
    add("--seconds", type=float, default=1.0, help="of timing for each candidate [1]")
    add("--out", type=Path, default=Path("compare"), metavar="DIR", help="to write [compare]")
    add("--seed", type=int, default=0, help="of random weights")
    return made


def names(text: str) -> list[str]:
    """Names of candidates, separated by commas."""
    found = text.split(",")
    if unknown := [name for name in found if name not in CANDIDATES]:
        raise argparse.ArgumentTypeError(
            f"must be of {', '.join(CANDIDATES)}, got {', '.join(map(repr, unknown))}"
            f"{did_you_mean(unknown[0], CANDIDATES)}"
        )
    return found
