"""The list of faults names tests that there are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.faults.__main__ import all_tests, page

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("test", all_tests())
def test_every_fault_has_tests_that_there_are(test: str) -> None:
    path, name = test.split("::")
    functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions


def test_every_test_of_a_fault_is_in_the_list() -> None:
    here = ROOT / "tests/faults"
    found = {
        f"tests/faults/{path.name}::{node.name}"
        for path in here.glob("test_*.py")
        if path.name != Path(__file__).name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert found - set(all_tests()) == set()


def test_the_page_says_what_failed_and_what_did_not_run() -> None:
    first, second = all_tests()[:2]
    results = {first: {"ran": 3, "failed": 1, "seconds": 1.0}}
    text = page({"tests": results, "rounds": 2, "date": "2026-01-01"})
    assert f"`{first.split('/')[-1]}` 1 of 3 FAILED" in text and f"`{second.split('/')[-1]}` not run" in text
