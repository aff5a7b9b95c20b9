# SPDX-License-Identifier: Apache-2.0
"""Lists the keys of configs: type, default and meaning, from the dataclasses themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from kdfast.configs.fields import Range, hints, plain, section


class Key(NamedTuple):
    """A key, without the sections.

    Attributes:
        name: Dotted name.
        kind: Its type and bounds, in words.
        default: As YAML would have it.
        meaning: The first to last sentence about it.
    """

    name: str
    kind: str
    default: str
    meaning: str


def key_help(config: Any, prefix: str = "", width: int = 80) -> str:
    """A text about the keys of a config whose names begin with a prefix; empty if none does.

    Args:
        config: Its values are the defaults that are named.
        prefix: Beginning of dotted names.
        width: Columns of the text.
    """
    lines: list[str] = []
    for key in described(type(config), config):
        if key.name.startswith(prefix):
            lines.append(f"{key.name} = {key.default}")
            about = f"{key.meaning} [{key.kind}]"
            lines += textwrap.wrap(about, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def described(cls: type, config: Any = None, prefix: str = "") -> Iterator[Key]:
    """All keys of a config dataclass.

    Args:
        cls: The dataclass.
        config: One of it; None where a section is absent: the defaults of the class.
        prefix: Dotted name of the section, with the dot.
    """
    about = attributes(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, hint in hints(cls).items():
        inner = section(hint)
        value = _default(fields[name]) if config is None else getattr(config, name)
        if inner is not None:
            yield from described(inner, value, f"{prefix}{name}.")
        else:
            yield Key(prefix + name, words(hint), _shown(value), about.get(name, ""))


def attributes(cls: type) -> dict[str, str]:
    """What the docstring of a class says about each attribute, in one line."""
    text = inspect.getdoc(cls) or ""
    found: dict[str, str] = {}
    name = ""
    for line in text.partition("Attributes:\n")[2].splitlines():
        entry = re.match(r" {4}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.startswith(" " * 8):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return {key: value.replace("``", "") for key, value in found.items()}


def words(hint: Any) -> str:
    """A type in words that fit into YAML."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = args[1] if isinstance(args[1], Range) else None
        return words(args[0]) + (f", {bounds}" if bounds is not None else "")
    if origin in (Union, types.UnionType):
        return " or ".join(words(option) for option in args)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is tuple:
        inner = words(args[0])
        return f"list of {inner}" if args[-1] is Ellipsis else f"{len(args)} x {inner}"
    named = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return named.get(hint, "null" if hint is type(None) else "keys and values")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(plain(value)) if value != "" else '""'
