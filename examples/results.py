# SPDX-License-Identifier: Apache-2.0
"""Result files of the examples: what was measured, by which command, on which machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from kdfast.machine.facts import machine_facts
from kdfast.machine.files import replacing


def facts(module: str) -> dict[str, Any]:
    """Machine, versions and commit of this process, and its command."""
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return {"machine": machine_facts(), "command": command}


def read(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The result file, or an empty one.

    Raises:
        ValueError: It was made with other settings.
    """
    if not path.exists():
        return {"config": config, "runs": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["config"] != json.loads(json.dumps(config)):
        raise ValueError(f"{path} must hold results of these settings, got {found['config']}")
    return found


def add(path: Path, config: dict[str, Any], run: str, result: dict[str, Any]) -> None:
    """Put the result of a run into a file, in place of an earlier one of the same name.

    Raises:
        ValueError: The file was made with other settings.
    """
    content = read(path, config)
    runs = {**content["runs"], run: result}
    content["runs"] = {name: runs[name] for name in sorted(runs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
