# SPDX-License-Identifier: Apache-2.0
"""Reads YAML whose size is that of its text: no aliases that multiply, no bottomless nesting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kdfast.configs.fields import ConfigError
from kdfast.machine.limits import MAX_YAML

MAX_DEPTH = 50
# Characters for each value that is allowed.
_LONG = 100


class YamlError(ValueError):
    """A text is no YAML, or means too much of it."""


def max_characters() -> int:
    """Length of the longest text that is parsed."""
    return _LONG * MAX_YAML()


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        YamlError: It cannot be parsed, or is larger, deeper or expands to more than any config.
    """
    if len(text) > max_characters():
        raise YamlError(
            f"must have at most {max_characters():,} characters, got {len(text):,}; "
            f"{MAX_YAML.name} changes that"
        )
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise YamlError(f"is not YAML: {error}") from error
    except RecursionError as error:
        raise YamlError(f"must be nested at most {MAX_DEPTH} deep") from error
    except YamlError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # of dates and numbers
        raise YamlError(f"holds a value that cannot be read: {error}") from error
    finally:
        loader.dispose()


def read_tree(source: str) -> dict[str, Any]:
    """The keys and values of the YAML file that ``--config`` names.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError([f"--config: no such file: {source}"])
    try:
        with path.open(encoding="utf-8") as file:
            tree = read_yaml(file.read(max_characters() + 1))
    except YamlError as error:
        raise ConfigError([f"--config: {source} {error}"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--config: {source} cannot be read as text: {error}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"--config: {source} must hold keys and values"])
    return tree


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Nodes that a node stands for; known ones are not walked again."""
    if depth > MAX_DEPTH:
        raise YamlError(f"must be nested at most {MAX_DEPTH} deep")
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in inner)
    if known[id(node)] > MAX_YAML():
        raise YamlError(
            f"must stand for at most {MAX_YAML():,} values and keys, got more; "
            f"{MAX_YAML.name} changes that"
        )
    return known[id(node)]
