# SPDX-License-Identifier: Apache-2.0
"""``python -m examples.documents``: writes the tables of docs/use/example_*.md.

What stands between ``<!-- example_NAME -->`` and ``<!-- end -->`` comes from the result file
bench/results/example_NAME.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.documents import filled, wrapped
from bench.rows import facts_line
from examples.cifar10.table import table as cifar10
from examples.saliency.table import table as saliency

ROOT = Path(__file__).resolve().parents[1]
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "example_cifar10": cifar10,
    "example_saliency": saliency,
}


def block(path: Path, table: Callable[[dict[str, Any]], str], picture: Path) -> str:
    """Commands, machines and table of a result file, and its picture if there is one."""
    if not path.exists():
        return f"There is no {path.name} yet."
    content = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for name, run in content["runs"].items():
        lines.append(f"- {name}: `{run['command']}`; {facts_line(run['machine'])}.")
    lines = [*map(wrapped, lines), "", table(content)]
    if picture.exists():
        lines += ["", f"![What the models see](../images/{picture.name})"]
    return "\n".join(lines)


def contents() -> dict[str, str]:
    """The block of every page, by its name."""
    results, images = ROOT / "bench" / "results", ROOT / "docs" / "images"
    return {
        name: block(results / f"{name}.json", table, images / f"{name}.png")
        for name, table in TABLES.items()
    }


def main() -> None:
    """Rewrites the generated blocks, and prints which pages changed."""
    for name, text in contents().items():
        path = ROOT / "docs" / "use" / f"{name}.md"
        before = path.read_text(encoding="utf-8")
        after = filled(before, {name: text})
        path.write_text(after, encoding="utf-8")
        print(f"{path}: {'as it was' if after == before else 'written'}")


if __name__ == "__main__":
    main()
