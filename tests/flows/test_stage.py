"""What stages leave for DVC and for each other."""

from __future__ import annotations

from pathlib import Path

from flows.stage import read_curves, write_curves


def test_curves_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    assert read_curves(path) == {}
    write_curves(path, [("5x", 1, -9.25), ("a,b", 1, 0.5), ("5x", 2, -10.0)])
    assert read_curves(path) == {"5x": [(1, -9.25), (2, -10.0)], "a,b": [(1, 0.5)]}
