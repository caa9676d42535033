"""JSON from strangers: one meaning a document, bounded before it is parsed.

Refused: more bytes than allowed, a byte order mark, text that is not UTF-8, duplicate keys, NaN, infinities
(also as 1e999), -0, integers that a float cannot hold, deep nesting, long strings, control characters.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

from lesa.errors import LesaError

MAX_DEPTH = 12
MAX_STRING = 4096  # characters
MAX_INTEGER = 2**53  # beyond it JSON readers disagree


class StrictJsonError(LesaError):
    """Why a document was refused, with the place where there is one."""


def parse(data: bytes, *, max_bytes: int, printable: bool = True) -> dict[str, Any]:
    """The object in `data`.

    Args:
        printable: False lets control and format characters pass, in texts that are compared or shown as `repr` alone:
            a prompt may join its letters with them.

    Raises:
        StrictJsonError: why there is none, and where.
    """
    if len(data) > max_bytes:
        raise StrictJsonError(f"{len(data)} bytes, at most {max_bytes} are read")
    if data.startswith(b"\xef\xbb\xbf"):
        raise StrictJsonError("starts with a byte order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except RecursionError:
        raise StrictJsonError(f"nested deeper than {MAX_DEPTH}") from None
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(value, dict):
        raise StrictJsonError(f"must be an object, got {type(value).__name__}")
    _check(value, "", 1, "Cc Cf Cs" if printable else "Cs")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise StrictJsonError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _integer(text: str) -> int:
    # Length first: converting a million digits takes long.
    if len(text) > 17 or abs(int(text)) >= MAX_INTEGER:
        raise StrictJsonError(f"integer {text[:20]} is outside what JSON readers agree on")
    if text == "-0":
        raise StrictJsonError("-0 is not an integer")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJsonError(f"number {text[:20]} is not finite")
    return value


def _constant(text: str) -> float:
    raise StrictJsonError(f"{text} is not a number")


def _check(value: Any, where: str, depth: int, refused: str) -> None:
    """Refuse what is too deep or too long, and characters of the `refused` Unicode categories."""
    if depth > MAX_DEPTH:
        raise StrictJsonError(f"nested deeper than {MAX_DEPTH} at {where[:80]}")
    if isinstance(value, str):
        _check_text(value, where, refused)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, where, refused)
            _check(item, f"{where}.{key}" if where else key, depth + 1, refused)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]", depth + 1, refused)


def _check_text(text: str, where: str, refused: str) -> None:
    if len(text) > MAX_STRING:
        raise StrictJsonError(f"text of {len(text)} characters at {where[:80]}, at most {MAX_STRING}")
    # Control, format (right-to-left marks) and surrogate characters could rewrite a terminal or a log.
    if not text.isprintable() and any(unicodedata.category(char) in refused for char in text):
        raise StrictJsonError(f"control characters in the text at {where[:80]}")
