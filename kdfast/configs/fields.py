# SPDX-License-Identifier: Apache-2.0
"""Field types with bounds, and the conversion of plain values to a typed config and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A config cannot be used.

    Attributes:
        problems: One line for each thing that is wrong.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n".join([f"config: {count}", *(f"  - {line}" for line in problems)]))


@contextmanager
def as_config_error() -> Iterator[None]:
    """Turns the complaints about files and values that a config names into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError([str(error)]) from error


@dataclass(frozen=True)
class Range:
    """Bounds of a number.

    Attributes:
        low: Smallest value.
        high: Largest value.
        ends: "[" or "(" and "]" or ")": a round bracket excludes that bound itself.
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"

    def __str__(self) -> str:
        low = (
            ""
            if self.low == -math.inf
            else f"{'above' if self.ends[0] == '(' else 'from'} {self.low:g}"
        )
        if self.high == math.inf:
            return low
        return f"{low} to {'below ' if self.ends[1] == ')' else ''}{self.high:g}".strip()

    def reason(self, value: float) -> str | None:
        """What must hold, or None if it does."""
        if not math.isfinite(value):
            return "must be finite"
        if value < self.low or (self.ends[0] == "(" and value == self.low):
            return f"must be {'above' if self.ends[0] == '(' else 'at least'} {self.low:g}"
        if value > self.high or (self.ends[1] == ")" and value == self.high):
            return f"must be {'below' if self.ends[1] == ')' else 'at most'} {self.high:g}"
        return None


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, ends="(]")]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, "(]")]
Rate = Annotated[float, Range(0, 1, "[)")]
Half = Annotated[float, Range(0, 0.5, "(]")]


class _BadValue(Exception):
    pass


def plain(config: Any) -> Any:
    """A config tree as dicts, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [plain(item) for item in config] if isinstance(config, tuple) else config


def defaults_of(cls: type) -> dict[str, Any]:
    """The defaults of a config dataclass as ``plain`` writes them; without what has none."""
    found: dict[str, Any] = {}
    kinds = hints(cls)
    for field in dataclasses.fields(cls):
        inner = section(kinds[field.name])
        if field.default is not dataclasses.MISSING:
            found[field.name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = plain(field.default_factory())
        elif inner is not None:
            found[field.name] = defaults_of(inner)
    return found


def hints(cls: type) -> dict[str, Any]:
    """Types of the fields of a config dataclass, bounds included."""
    return get_type_hints(cls, include_extras=True)


def section(hint: Any) -> type | None:
    """The config dataclass that a field holds (also if it may be None), or None for a leaf."""
    for option in (hint, *get_args(hint)):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of every field below ``cls``, sections included."""
    found: list[str] = []
    for name, hint in hints(cls).items():
        found.append(prefix + name)
        inner = section(hint)
        if inner is not None:
            found += keys(inner, f"{prefix}{name}.")
    return found


def unknown(key: str, known: list[str]) -> str:
    """The complaint about a key that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        close = [last[name] for name in difflib.get_close_matches(key, list(last), n=1, cutoff=0.5)]
    return f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")


def build(cls: type[T], data: Mapping[str, Any], problems: list[str], prefix: str = "") -> T | None:
    """A config dataclass of plain values; everything that is wrong is appended to ``problems``.

    Args:
        cls: The dataclass.
        data: Its fields by name; sections are mappings; fields with a default may be missing.
        problems: One line is added for each unknown key, missing field and bad value.
        prefix: Dotted name of the section, with the dot.

    Returns:
        The config, or None where a problem was found.
    """
    before = len(problems)
    known = hints(cls)
    problems += [
        unknown(f"{prefix}{key}", keys(cls, prefix)) for key in data if str(key) not in known
    ]
    required = {
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    problems += [f"{prefix}{name}: missing" for name in sorted(required - set(data))]
    values: dict[str, Any] = {}
    for name, hint in known.items():
        if name not in data:
            continue
        inner, value = section(hint), data[name]
        if inner is not None and isinstance(value, Mapping):
            values[name] = build(inner, value, problems, f"{prefix}{name}.")
            continue
        try:
            values[name] = convert(value, hint)
        except _BadValue as error:
            problems.append(f"{prefix}{name}: {error}, got {value!r}")
    return cls(**values) if len(problems) == before else None


def convert(value: Any, hint: Any) -> Any:
    """``value`` as the type of a field; raises ``_BadValue`` with what must hold."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        result = convert(value, args[0])
        reason = args[1].reason(result)
        if reason:
            raise _BadValue(reason)
        return result
    if origin in (Union, types.UnionType):
        return _union(value, args)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            raise _BadValue(f"must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        return _tuple(value, args)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _BadValue("must be keys and values such as {depth: 6}")
        return dict(value)
    return _scalar(value, hint)


def _union(value: Any, options: tuple[Any, ...]) -> Any:
    if value is None and type(None) in options:
        return None
    reasons: list[str] = []
    for option in options:
        if option is type(None):
            reasons.append("must be null")
            continue
        try:
            return convert(value, option)
        except _BadValue as error:
            reasons.append(str(error))
    raise _BadValue(" or ".join(reasons))


def _tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, Mapping) and get_origin(args[0]) is dict:
        value = [value]  # one for all
    if not isinstance(value, (list, tuple)):
        raise _BadValue("must be a list such as [1, 2]")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(convert(item, args[0]) for item in value)
    if len(value) != len(args):
        raise _BadValue(f"must be a list of {len(args)}")
    return tuple(convert(item, arg) for item, arg in zip(value, args, strict=True))


def _scalar(value: Any, hint: Any) -> Any:
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a string.
        try:
            value = float(value)
        except ValueError:
            raise _BadValue("must be a number") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if type(value) is not hint:
        raise _BadValue(f"must be {words.get(hint, 'a section with keys')}")
    return value
