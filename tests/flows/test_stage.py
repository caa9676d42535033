"""What stages leave for DVC and for each other."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from flows.stage import read_curves, write_curves
from lesa.params import Workload


def test_curves_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    assert read_curves(path) == {}
    write_curves(path, [("5x", 1, -9.25), ("a,b", 1, 0.5), ("5x", 2, -10.0)])
    assert read_curves(path) == {"5x": [(1, -9.25), (2, -10.0)], "a,b": [(1, 0.5)]}


@pytest.mark.parametrize("stage", ["base", "search", "train_stage1", "train_stage2", "evaluate"])
def test_a_stage_tracks_sections_that_there_are(stage: str) -> None:
    """The names are looked up when the run begins: a wrong one would end the stage after everything was set up."""
    source = (Path(__file__).resolve().parents[2] / f"flows/{stage}.py").read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == "stage_run"]
    name, _, sections = call.args
    assert ast.literal_eval(name) == stage
    assert set(ast.literal_eval(sections)) <= {field.name for field in dataclasses.fields(Workload)}
