# SPDX-License-Identifier: Apache-2.0
"""Words of ``kdfast info``."""

from __future__ import annotations

import argparse

from kdfast.commandline.parser import Parser, add_config

DESCRIPTION = "Versions, hardware and its limits, what runs fused here, and what a run lacks."
EXAMPLES = (
    "kdfast info",
    "kdfast info --config orion50 --set teacher.checkpoint=orion.pth",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("info", DESCRIPTION, EXAMPLES)
    add_config(made, "name or YAML file: check what its run needs")
    made.add_argument("--memory", action="store_true", help="only RAM and GPU memory")
    return made
