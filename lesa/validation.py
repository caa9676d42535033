"""Plain values -> frozen dataclasses: every problem by its dotted path, and names that are safe in paths."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import field
from typing import Any, Literal

NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")  # workloads, prompt sets, budgets


def setting(default: Any = dataclasses.MISSING, *, low: Any = None, high: Any = None) -> Any:
    """A dataclass field with an inclusive range."""
    return field(default=default, metadata={"low": low, "high": high})


def build(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Convert a plain value to an annotated type, appending what is wrong to `problems`."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, value, where, problems)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return build(next(a for a in arguments if a is not type(None)), value, where, problems)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            problems.append(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            problems.append(f"{where}: must be a list, got {describe(value)}")
            return ()
        return tuple(build(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not value:
            problems.append(f"{where}: must be a mapping with at least one entry, got {describe(value)}")
            return {}
        return {str(key): build(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        hint = " (write 1.0e-3: YAML reads 1e-3 as text)" if kind is float and isinstance(value, str) else ""
        problems.append(f"{where}: must be {kind.__name__}, got {describe(value)}{hint}")
    elif kind is float and (value != value or value in (float("inf"), float("-inf"))):
        problems.append(f"{where}: must be finite, got {value}")
    return value


def _build_dataclass(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where}: must be a mapping, got {describe(value)}")
        return None
    hints, before = typing.get_type_hints(kind), len(problems)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            close = [name for name in fields if name.startswith(str(key)[:4])]
            hint = f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(fields)}"
            problems.append(f"{where}.{key}: unknown key{hint}")
    arguments = {}
    for name, spec in fields.items():
        if name not in value:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                problems.append(f"{where}.{name}: missing")
            continue
        mark = len(problems)
        arguments[name] = built = build(hints[name], value[name], f"{where}.{name}", problems)
        low, high = spec.metadata.get("low"), spec.metadata.get("high")
        if len(problems) == mark and built is not None:
            if low is not None and built < low:
                problems.append(f"{where}.{name}: must be at least {low}, got {built}")
            if high is not None and built > high:
                problems.append(f"{where}.{name}: must be at most {high}, got {built}")
    return kind(**arguments) if len(problems) == before else None


def describe(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]
