"""The list of planted faults cannot rot: every one still applies, and names tests that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planted.__main__ import WANTED, figures, row_of, write
from tests.planted.fault import Fault
from tests.planted.faults import FAULTS
from tests.planted.trial import ROOT, Outcome, failed_tests


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies_to_code_that_still_compiles(fault: Fault) -> None:
    text = fault.planted_in((ROOT / fault.file).read_text())
    compile(text, fault.file, "exec", dont_inherit=True)
    assert fault.tests and all((ROOT / path).is_file() for path in fault.tests)


def test_there_are_enough_and_each_has_a_name() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 60
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(names)


def test_a_text_that_is_not_there_once_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    with pytest.raises(ValueError, match="occurs 2 times in a.py"):
        Fault("twice", "a.py", "= 1", "= 2", ()).plant(tmp_path)
    with pytest.raises(ValueError, match="changes nothing"):
        Fault("same", "a.py", "x = 1", "x = 1", ()).plant(tmp_path)
    Fault("once", "a.py", "x = 1", "x = 2", ()).plant(tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 2\ny = 1\n"


def test_what_is_caught_is_counted_and_kept(tmp_path: Path) -> None:
    first, second, third = FAULTS[:3]
    rows = {
        first.name: row_of(first, Outcome(result="caught", by="tests/a.py::test_b", seconds=1.5)),
        second.name: row_of(second, Outcome(result="survived", by="", seconds=2.0)),
    }
    assert figures(rows, [first, second]) == (1, 2) and figures(rows, [first, third]) == (1, 2)
    assert 1 < WANTED * 2, "one of two is not enough"
    write(tmp_path / "kept.json", rows)
    table = (tmp_path / "kept.md").read_text()
    assert f"| {first.name} | `{first.file}` | caught | `tests/a.py::test_b` | 1.5 |" in table
    assert f"{len(FAULTS) - 2} were not run" in table or any(fault.equivalent for fault in FAULTS)


def test_the_first_failure_is_read_from_the_summary() -> None:
    printed = "..F\nFAILED tests/a.py::test_b[x] - assert 1 == 2\nERROR tests/c.py - ImportError\n1 failed"
    assert failed_tests(printed) == ["tests/a.py::test_b[x]", "tests/c.py"]
