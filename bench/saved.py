# SPDX-License-Identifier: Apache-2.0
"""Result files of the commands here that are no pytest benchmarks: machine, command, and rows."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast.machine.facts import machine_facts


def command_of(module: str) -> str:
    """The command line that runs now, with paths by their last names alone."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python -m", module, *words])


def save_rows(
    path: Path, module: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write a result file, a row a line; it belongs into bench/results.

    Args:
        path: The file.
        module: What was run.
        facts: What all rows have in common.
        rows: One for each line of a table.
    """
    content = {"machine": machine_facts(), "command": command_of(module), **facts}
    parts = [f' "{key}": {json.dumps(value)}' for key, value in content.items()]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    parts.append(f' "rows": [\n{lines}\n ]')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    print(path)
