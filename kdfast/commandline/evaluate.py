# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kdfast.commandline.parser import Parser, add_config

DESCRIPTION = """A pruned backbone of ORION against its teacher, frame by frame: boxes as nuScenes
measures them, lanes by their Chamfer distance, and the features of every block, through the same
frozen heads on the same held-out frames (docs/use/orion.md)."""
EXAMPLES = (
    "kdfast evaluate --config orion50_mini --checkpoint runs/orion50_mini/student.safetensors",
    "kdfast evaluate --config runs/orion50/config.yaml \\\n"
    "      --checkpoint runs/orion50/student.safetensors --frames 200",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("evaluate", DESCRIPTION, EXAMPLES)
    add_config(made, "name or YAML file of a run with frames", required=True)
    made.add_argument(
        "--checkpoint", type=Path, action="append", required=True, help="student.safetensors"
    )
    made.add_argument("--frames", type=int, help="held-out frames to use [all]")
    made.add_argument("--out", type=Path, default=Path("runs/evaluate"), help="[runs/evaluate]")
    return made
