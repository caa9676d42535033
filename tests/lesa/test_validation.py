"""Plain values become dataclasses, or every problem is named by its path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest

from lesa.validation import NAME, build, is_int, matching, setting, sound_parts


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str = matching(NAME, "a name", key="class")
    size: int | None = setting(None, low=1, high=8)


@dataclass(frozen=True, kw_only=True)
class Whole:
    parts: dict[str, Part]
    levels: tuple[float, ...] = setting(accept=lambda levels: len(levels) == 2, what="two levels")
    notes: dict[str, Any]
    text: str | None


GOOD = {"parts": {"a": {"class": "x", "size": 3}}, "levels": [1, 0.5], "notes": {}, "text": None}


def problems_of(value: Any, *, complete: bool = False, where: str = "") -> list[str]:
    problems: list[str] = []
    built = build(Whole, value, where, problems, complete=complete)
    assert (built is None) == bool(problems)
    return problems


def test_a_document_is_built_whole():
    problems: list[str] = []
    built = build(Whole, GOOD, "", problems, complete=True)
    assert problems == []
    assert built == Whole(parts={"a": Part(name="x", size=3)}, levels=(1.0, 0.5), notes={}, text=None)
    assert all(type(level) is float for level in built.levels)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"parts": {"a": {"class": "../x", "size": 3}}}, r"parts\.a\.class: must be a name, got str '\.\./x'"),
        ({"parts": {"a": {"class": "x", "size": 9}}}, r"parts\.a\.size: must be at most 8, got 9"),
        ({"parts": {"a": {"class": "x", "size": True}}}, r"parts\.a\.size: must be int, got bool True"),
        ({"parts": {"a": {"name": "x", "size": 1}}}, r"parts\.a\.name: unknown key; known: class, size"),
        ({"parts": {}}, r"parts: must be a mapping with at least one entry, got dict \{\}"),
        ({"levels": [1.0]}, r"levels: must be two levels, got list \[1\.0\]"),
        ({"levels": [1.0, "high"]}, r"levels\[1\]: must be float, got str 'high'$"),
        ({"levels": [1.0, "1e-3"]}, r"levels\[1\]: must be float, got str '1e-3' \(write 1\.0e-3"),
        ({"levels": [1.0, float("nan")]}, r"levels\[1\]: must be finite, got nan"),
        ({"notes": [1]}, r"notes: must be a mapping, got list \[1\]"),
        ({"text": 1}, r"text: must be str, got int 1"),
        ({"texts": 1}, r"texts: unknown key; did you mean text\?"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(change, problem):
    (first, *others) = problems_of(GOOD | change)
    assert re.match(problem, first)
    assert all("missing" in other for other in others), "a key under another name is missing under its own"
    assert problems_of(GOOD | change, where="at")[0] == f"at.{first}"


def test_a_closed_format_leaves_nothing_out():
    value = GOOD | {"parts": {"a": {"class": "x"}}}
    assert problems_of(value) == []
    assert problems_of(value, complete=True) == ["parts.a.size: missing"]


def test_a_long_list_of_wrong_values_is_cut():
    problems = problems_of(GOOD | {"levels": ["x"] * 1000})
    assert len(problems) == 9 and problems[-1] == "levels: and perhaps more of its 1000 items"


def test_a_long_key_is_cut():
    (problem,) = problems_of(GOOD | {"x" * 1000: 1})
    assert problem.startswith("x" * 70 + ": unknown key")


def test_what_is_no_document_at_all():
    assert problems_of([1]) == ["document: must be a mapping, got list [1]"]


def test_the_sound_parts_of_a_faulty_document():
    parts = sound_parts(Whole, {"parts": {"a": {"class": "x"}}, "levels": [1.0], "notes": {"a": 1}})
    assert parts.parts == {"a": Part(name="x")} and parts.notes == {"a": 1}
    assert parts.levels is None and parts.text is None
    assert sound_parts(Whole, {"parts": {"a": {"class": "x"}}}, complete=True).parts is None
    assert sound_parts(Part, {}).size is None and sound_parts(Part, 7).name is None


def test_true_is_no_number():
    assert is_int(0) and is_int(-7)
    assert not any(map(is_int, (True, False, 1.0, "1", None)))
