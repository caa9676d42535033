"""Plain values -> frozen dataclasses: every problem by its dotted path, and names that are safe in paths."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal

NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")  # workloads, prompt sets, budgets
_MAX_LISTED = 8  # problems of one list; a long list of wrong values says no more than its first ones
_MAX_KEY = 70  # characters of a key in a path: a document's own keys may be of any length


def setting(
    default: Any = dataclasses.MISSING,
    *,
    low: Any = None,
    high: Any = None,
    accept: Callable[[Any], bool] | None = None,
    what: str = "",
    key: str | None = None,
) -> Any:
    """A dataclass field that `build` fills.

    Args:
        default: where the key may be left out.
        low, high: an inclusive range.
        accept: whether a value of the right type is good, and `what` it must be if not.
        key: its name in the document; None takes the field's.
    """
    return field(default=default, metadata={"low": low, "high": high, "accept": accept, "what": what, "key": key})


def matching(pattern: re.Pattern[str], what: str, *, key: str | None = None) -> Any:
    """A field of text that matches `pattern` as a whole."""
    return setting(accept=lambda text: pattern.fullmatch(text) is not None, what=what, key=key)


def is_int(value: object) -> bool:
    """Whether a plain value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def build(kind: Any, value: Any, where: str, problems: list[str], *, complete: bool = False) -> Any:
    """Convert a plain value to an annotated type, appending what is wrong to `problems`.

    Args:
        where: dotted path of the value; empty for a whole document.
        complete: no key may be left out, whatever its default: a closed format has one form.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, value, where, problems, complete)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        some = next(a for a in arguments if a is not type(None))
        return build(some, value, where, problems, complete=complete)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            problems.append(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        return _build_tuple(arguments[0], value, where, problems, complete)
    if origin is dict:
        return _build_dict(arguments[1], value, where, problems, complete)
    return _plain(kind, value, where, problems)


def sound_parts(kind: Any, value: Any, *, complete: bool = False) -> Any:
    """The fields of a dataclass that are right in themselves in a mapping that may be faulty, as attributes.

    None stands for the others: a rule between fields is checked where all its fields are sound.
    """
    hints, parts = typing.get_type_hints(kind), dict[str, Any]()
    for spec in dataclasses.fields(kind):
        problems: list[str] = []
        name = spec.metadata.get("key") or spec.name
        if isinstance(value, dict) and name in value:
            built = _build_field(spec, hints[spec.name], value[name], name, problems, complete)
            parts[spec.name] = None if problems else built
        else:
            parts[spec.name] = None if spec.default is dataclasses.MISSING else spec.default
    return types.SimpleNamespace(**parts)


def _plain(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """A value of a built-in type; whole numbers become floats where floats are wanted."""
    if kind is float and is_int(value) and abs(value) < 2**53:
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        hint = " (write 1.0e-3: YAML reads 1e-3 as text)" if kind is float and _is_number_text(value) else ""
        problems.append(f"{where}: must be {kind.__name__}, got {describe(value)}{hint}")
    elif kind is float and (value != value or value in (float("inf"), float("-inf"))):
        problems.append(f"{where}: must be finite, got {value}")
    return value


def _is_number_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and float(value) == float(value)
    except ValueError:
        return False


def _build_tuple(kind: Any, value: Any, where: str, problems: list[str], complete: bool) -> tuple[Any, ...]:
    if not isinstance(value, list):
        problems.append(f"{where}: must be a list, got {describe(value)}")
        return ()
    items, before = [], len(problems)
    for index, item in enumerate(value):
        if len(problems) - before >= _MAX_LISTED:
            problems.append(f"{where}: and perhaps more of its {len(value)} items")
            break
        items.append(build(kind, item, f"{where}[{index}]", problems, complete=complete))
    return tuple(items)


def _build_dict(kind: Any, value: Any, where: str, problems: list[str], complete: bool) -> dict[str, Any]:
    if not isinstance(value, dict) or not (value or kind is Any):
        least = "" if kind is Any else " with at least one entry"
        problems.append(f"{where}: must be a mapping{least}, got {describe(value)}")
        return {}
    return {
        str(key): build(kind, item, _path(where, key), problems, complete=complete) for key, item in value.items()
    }


def _build_dataclass(kind: Any, value: Any, where: str, problems: list[str], complete: bool) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where or 'document'}: must be a mapping, got {describe(value)}")
        return None
    hints, before = typing.get_type_hints(kind), len(problems)
    fields = {spec.metadata.get("key") or spec.name: spec for spec in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            close = [name for name in fields if name.startswith(str(key)[:4])]
            hint = f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(fields)}"
            problems.append(f"{_path(where, key)}: unknown key{hint}")
    arguments = {}
    for key, spec in fields.items():
        if key in value:
            path = _path(where, key)
            arguments[spec.name] = _build_field(spec, hints[spec.name], value[key], path, problems, complete)
        elif complete or (spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING):
            problems.append(f"{_path(where, key)}: missing")
    return kind(**arguments) if len(problems) == before else None


def _build_field(
    spec: dataclasses.Field[Any], hint: Any, value: Any, path: str, problems: list[str], complete: bool
) -> Any:
    """A field's value, held to its range and to what else it must be."""
    before = len(problems)
    built = build(hint, value, path, problems, complete=complete)
    if len(problems) > before or built is None:
        return built
    low, high, accept = (spec.metadata.get(name) for name in ("low", "high", "accept"))
    if low is not None and built < low:
        problems.append(f"{path}: must be at least {low}, got {built}")
    if high is not None and built > high:
        problems.append(f"{path}: must be at most {high}, got {built}")
    if accept is not None and not accept(built):
        problems.append(f"{path}: must be {spec.metadata['what']}, got {describe(value)}")
    return built


def _path(where: str, key: object) -> str:
    name = str(key)[:_MAX_KEY]
    return f"{where}.{name}" if where else name


def describe(value: Any) -> str:
    """Type and value for a message, at most 80 characters."""
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]
