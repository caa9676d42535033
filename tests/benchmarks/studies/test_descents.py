"""One descent beside several, through a real, tiny pipeline."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.studies import descents
from lesa.search import finalists
from tests.lesa.search.test_descent import searched
from tests.lesa.training.test_closed_loop import Place, place  # noqa: F401 - fixtures


def test_both_ways_make_as_many_runs_from_the_same_starts(
    place: Place, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    monkeypatch.setattr(finalists, "APART", 1)
    workload = searched(
        place.workload, descents=2, evaluations=4, screened=3, screen_iterations=1, finalists=2, finalist_iterations=3
    )
    one, several = descents.ways(workload.search).values()
    assert several == workload.search
    assert (one.descents, one.evaluations, one.screened, one.finalists) == (1, 8, 1, 2)
    rows = descents.searched(workload, ["2x"], [0, 1])
    assert [(row["budget"], row["seed"]) for row in rows] == [("2x", 0), ("2x", 1)]
    for row in rows:
        assert row["one"]["runs"] <= 8 and row["several"]["runs"] <= 8
        assert row["one"]["error_db"] <= row["one"]["closed_form_db"] + 1e-4, "training may not make it worse"
        assert len(row["several"]["full_steps"]) == 4
    text = descents.table({"workload": "tiny", "search": dataclasses.asdict(workload.search), "rows": rows})
    mean = sum(row["several"]["error_db"] - row["one"]["error_db"] for row in rows) / 2
    assert f"| {mean:+.2f} | | |" in text.splitlines()[-1]
