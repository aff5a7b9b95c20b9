# SPDX-License-Identifier: Apache-2.0
"""What imports kdfast.kernels, and what that imports.

``lint-imports`` (pyproject.toml) holds all other layers; it does not see the kernels, which lie
outside the folder of the package.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "kdfast.kernels"


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of kdfast that are imported below a node, also inside functions."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == "kdfast")


def parsed(folder: str) -> dict[str, ast.Module]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return {
        str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in files
    }


def test_kernels_import_only_each_other() -> None:
    for file, tree in parsed("kernels").items():
        above = [name for name in imports(tree) if not name.startswith(KERNELS)]
        assert not above, file


def test_only_ops_import_kernels_and_only_when_they_run_them() -> None:
    for file, tree in parsed("kdfast").items():
        used = [name for name in imports(tree) if name.startswith(KERNELS)]
        assert not used or file.startswith("kdfast/ops/"), file
        # Triton is not installed everywhere, so no op imports it before its kernel is called.
        early = [name for node in tree.body for name in imports_at_import(node)]
        assert not [name for name in early if name.startswith(KERNELS)], file


def imports_at_import(node: ast.stmt) -> Iterator[str]:
    """Modules of kdfast that a statement imports as soon as the file is imported."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    inner = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)]
    if inner:
        for part in inner:
            yield from imports_at_import(part)
    else:
        yield from imports(node)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import kdfast.kernels._common", [f"{KERNELS}._common"]),
        ("from kdfast.kernels import kd_loss", [f"{KERNELS}.kd_loss"]),
        ("from kdfast import kernels", [KERNELS]),
        ("if True:\n    from kdfast.kernels import kd_loss", [f"{KERNELS}.kd_loss"]),
        ("def f():\n    from kdfast.kernels import kd_loss", []),
        ("import torch", []),
    ],
)
def test_imports_are_seen(text: str, found: list[str]) -> None:
    (node,) = ast.parse(text).body
    assert list(imports_at_import(node)) == found


def test_a_file_at_the_root_is_a_command() -> None:
    """A folder of kdfast/ is a library; a file is run by ``python -m kdfast.NAME``."""
    names = {file.stem for file in (ROOT / "kdfast").glob("*.py")} - {
        "__init__",
        "__main__",
        "_version",
    }
    assert names == {
        *("attention", "compare", "compare_runs", "distill", "evaluate", "info", "plan"),
        *("prune", "train"),
    }
    for name in names:
        tree = ast.parse((ROOT / "kdfast" / f"{name}.py").read_text(encoding="utf-8"))
        assert f"python -m kdfast.{name}" in (ast.get_docstring(tree) or ""), name
        assert any(isinstance(x, ast.FunctionDef) and x.name == "main" for x in tree.body), name
