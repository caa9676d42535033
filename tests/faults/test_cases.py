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


def test_the_page_says_what_failed_and_what_did_not_run() -> None:
    first, second = all_tests()[:2]
    results = {first: {"ran": 3, "failed": 1, "seconds": 1.0}}
    text = page({"tests": results, "rounds": 2, "date": "2026-01-01"})
    assert f"`{first.split('/')[-1]}` 1 of 3 FAILED" in text and f"`{second.split('/')[-1]}` not run" in text
