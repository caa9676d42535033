"""Seeded damage to documents: to their bytes, and to the structure of JSON and YAML.

A document is held as a tree whose objects are lists of pairs and whose odd spellings stand as they are, so that it can
have a key twice, or a number that no writer would write.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any


class Raw(str):
    """A token that is written as it stands."""


class Pairs(list[tuple[str, Any]]):
    """An object's keys and values, in order; a key may stand twice."""


DEEP = (5, 13, 400, 100_000)
NUMBERS = (
    "0", "-0", "1", "-1", "1.0", "-0.0", "0.5", "1e-400", "1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity",
    "9007199254740991", "9007199254740993", "9223372036854775808", "-9223372036854775809", "1" + "0" * 40, "9" * 6000,
    "0x10", "01", "+1", "1_000", ".5", "1.",
)  # fmt: skip
TEXTS = (
    "", " ", "..", "../x", "/etc/passwd", "a/b", "%2e%2e", "con", "None", "null", "true", "nan", "1", "1e-3", "é",
    "\x00",
    "\x1b[2J", "\u202e", "\ud800", "\ufeff", "\n", "x" * 65, "x" * 5000, "os.system", "__class__", "torch.hub.load",
)  # fmt: skip
PLAIN = ("null", "true", "false", "[]", "{}", "[[]]", "[null]", '{"":null}', '{"a":{}}')
OF_YAML = (
    "~", "no", "on", "1e-3", "0o17", "12:30:45", "2020-13-45", "2001-01-01", ".nan", "-.inf", "=", "&a x", "*a",
    "*small", "!!python/object/apply:os.system [echo]", "!!binary aGk=", "!!set {a}", "!!timestamp 2001-01-01", "|",
    "? a", "{? a}",
    "{[1]: 2}", "{1: 2}", "{~: 2}", "{<<: {a: 1}}", "{<<: [1]}", "@", "`", "%", '"', "'", "- -", "#",
)  # fmt: skip


def tree(value: Any) -> Any:
    """A plain value as a tree."""
    if isinstance(value, dict):
        return Pairs((str(key), tree(item)) for key, item in value.items())
    return [tree(item) for item in value] if isinstance(value, list) else value


def written(node: Any) -> str:
    """The tree as JSON, which YAML reads as well."""
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(item)}" for key, item in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(written, node)) + "]"
    return json.dumps(node)


def mutated_tree(rng: random.Random, document: Any, *, yaml: bool = False) -> bytes:
    """The document with one to three of its values, keys or places changed."""
    root = tree(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holders = [node for node in _nodes(root) if len(node)]
        holder = rng.choice(holders) if holders else root
        if isinstance(holder, list) and len(holder):
            rng.choice(_CHANGES)(rng, holder, holders, yaml)
    # Half of a pair of surrogates has no UTF-8, but JSON's escapes spell it.
    return written(root).encode("utf-8", "surrogatepass")


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one to four places flipped, cut, doubled, or filled with others."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not changed:
            break
        at, length = rng.randrange(len(changed)), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 200))
        elif kind == 4:
            del changed[at:]
        else:
            changed[at : at + length] = rng.choice((b"\0", b"\xff" * length, b'"', b"{", b"[", b"}", b"\\", b"-", b"9"))
    return bytes(changed)


def _nodes(node: Any) -> list[list[Any]]:
    if not isinstance(node, list):
        return []
    children = [item for _, item in node] if isinstance(node, Pairs) else node
    return [node, *(found for child in children for found in _nodes(child))]


def _odd(rng: random.Random, yaml: bool) -> Any:
    """A value that hardly anything expects."""
    kind = rng.randrange(7 if yaml else 6)
    if kind == 0:
        return Raw(rng.choice(NUMBERS))
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return Raw(rng.choice(PLAIN))
    if kind == 3:
        depth = rng.choice(DEEP)
        opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
        return Raw(opened * depth + ("0" if opened != "[" else "") + closed * depth)
    if kind == 4:
        return Raw("[" + ",".join([rng.choice(("0", "null", '"x"'))] * rng.choice((1, 3, 2000))) + "]")
    return Raw(rng.choice(OF_YAML)) if kind == 6 else rng.choice((0, 1, -1, 2**31, 2**53 - 1, 0.1, True, None))


def _put(holder: list[Any], at: int, value: Any) -> None:
    holder[at] = (holder[at][0], value) if isinstance(holder, Pairs) else value


def _get(holder: list[Any], at: int) -> Any:
    return holder[at][1] if isinstance(holder, Pairs) else holder[at]


def _replace(rng: random.Random, holder: list[Any], holders: Sequence[list[Any]], yaml: bool) -> None:
    _put(holder, rng.randrange(len(holder)), _odd(rng, yaml))


def _shift(rng: random.Random, holder: list[Any], holders: Sequence[list[Any]], yaml: bool) -> None:
    """A near neighbour of a value, so that more than the first check is met."""
    at = rng.randrange(len(holder))
    value = _get(holder, at)
    if isinstance(value, bool) or value is None:
        _put(holder, at, not value)
    elif isinstance(value, int | float):
        _put(holder, at, rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value), [value])))
    elif isinstance(value, str):
        _put(holder, at, rng.choice((value + "x", value[:-1], value.upper(), [value], {})))
    else:
        _put(holder, at, rng.choice((Raw("[]"), Raw("{}"), [value], Pairs([("a", value)]))))


def _drop(rng: random.Random, holder: list[Any], holders: Sequence[list[Any]], yaml: bool) -> None:
    del holder[rng.randrange(len(holder))]


def _double(rng: random.Random, holder: list[Any], holders: Sequence[list[Any]], yaml: bool) -> None:
    holder.insert(rng.randrange(len(holder) + 1), rng.choice(holder))


def _rename(rng: random.Random, holder: list[Any], holders: Sequence[list[Any]], yaml: bool) -> None:
    if isinstance(holder, Pairs):
        at = rng.randrange(len(holder))
        key = holder[at][0]
        holder[at] = (rng.choice((key + "x", key[:-1], key.upper(), *TEXTS)), holder[at][1])


def _swap(rng: random.Random, holder: list[Any], holders: Sequence[list[Any]], yaml: bool) -> None:
    other = rng.choice(holders)
    here, there = rng.randrange(len(holder)), rng.randrange(len(other))
    ours, theirs = _get(holder, here), _get(other, there)
    if not (_contains(ours, other) or _contains(theirs, holder)):  # a document has no circles
        _put(holder, here, theirs)
        _put(other, there, ours)


def _contains(node: Any, sought: list[Any]) -> bool:
    return any(found is sought for found in _nodes(node))


_CHANGES: tuple[Callable[[random.Random, list[Any], Sequence[list[Any]], bool], None], ...] = (
    _replace, _replace, _replace, _shift, _shift, _drop, _double, _rename, _swap,
)  # fmt: skip
