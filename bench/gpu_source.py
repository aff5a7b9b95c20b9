# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of the code that an op's kernels come from.

They say at once whether the kernels may have changed: they cover the definitions that a launch of
the op reaches in kernels/, not files, comments or formatting. Whether a change reaches a binary is
then decided by what the compiler makes of the code, see ``bench.gpu_cases.trace``.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import aot
from kdfast.kernels._blocks import FOLDER

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "kdfast.kernels"
Place = tuple[str, str]  # a module of kernels/ and a name in it; "" is the whole module


@functools.cache
def fingerprints() -> dict[str, str]:
    """For each op of bench.aot."""
    return {op: fingerprint(op) for op in aot.OPS}


def fingerprint(op: str) -> str:
    """Of what ``forward`` and ``backward`` of the op's kernels reach, and of its call in aot."""
    digest = hashlib.sha256()
    modules: dict[str, Module] = {}
    wanted: list[Place] = [(op, "forward"), (op, "backward")]
    found: dict[Place, Any] = {}
    while wanted:
        place = wanted.pop()
        if place in found:
            continue
        module, name = place
        if module not in modules:
            text = (ROOT / "kernels" / f"{module}.py").read_text(encoding="utf-8")
            modules[module] = Module(ast.parse(text))
        nodes = modules[module].nodes(name)
        found[place] = code(nodes)
        for node in nodes:
            wanted += modules[module].needed(module, node)
    for place in sorted(found):
        digest.update(repr((place, found[place])).encode())
    if ("_blocks", "table") in found:
        for file in sorted(FOLDER.glob("*.json")):
            digest.update(file.read_bytes())
    launcher = aot.OPS[op].__name__
    for node in ast.parse(Path(aot.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == launcher:
            digest.update(repr(code(node)).encode())
    return digest.hexdigest()[:16]


class Module:
    """The top-level statements of a module by the names that they define."""

    def __init__(self, tree: ast.Module) -> None:
        self.defined: dict[str, list[ast.stmt]] = {}
        self.imported: dict[str, Place] = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                inside = (node.module or "")[len(PACKAGE) + 1 :]
                for alias in node.names:
                    place = (inside, alias.name) if inside else (alias.name, "")
                    self.imported[alias.asname or alias.name] = place
            else:
                for name in names_defined(node):
                    self.defined.setdefault(name, []).append(node)

    def nodes(self, name: str) -> list[ast.stmt]:
        """The statements that define ``name``; of the whole module if it is empty."""
        if name:
            return self.defined.get(name, [])
        return [node for nodes in self.defined.values() for node in nodes]

    def needed(self, module: str, node: ast.AST) -> Iterator[Place]:
        """What of kernels/ a statement names."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                if part.id in self.imported:
                    yield self.imported[part.id]
                elif part.id in self.defined:
                    yield module, part.id


def names_defined(node: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement binds or changes."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
    elif not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)):
        raise NotImplementedError(f"gpu_source: what does this define? {ast.unparse(node)}")


def code(node: Any) -> Any:
    """A syntax tree as nested tuples, the same in every version of Python, without docstrings."""
    if isinstance(node, list):
        return tuple(map(code, node))
    if not isinstance(node, ast.AST):
        return node
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return type(node).__name__, *((name, code(value)) for name, value in fields.items())
