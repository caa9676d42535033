"""A search's jobs see training trajectories alone: validation and test have no say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lesa.params import BudgetParams
from lesa.schedule import Schedule
from lesa.search import jobs
from lesa.search.jobs import SearchJob, cheapest_starts, run_search_job
from tests.helpers.training_set import STEPS, sigmas, workload


class Set:
    """Trajectories of a split."""

    sigmas = sigmas()


TRAIN, VALIDATION = Set(), Set()
SEARCHED = {"budgets": {"3x": BudgetParams(num_full=4)}, "default_budget": "3x"}


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kept_splits", "recorded_splits"):
        monkeypatch.setattr(jobs, name, lambda workload: (TRAIN, VALIDATION))
    monkeypatch.setattr(jobs, "load_pipeline", lambda model, device: "the pipeline")
    monkeypatch.setattr(jobs, "transformer_folder", lambda workload: None)
    monkeypatch.setattr(jobs, "load_output_head", lambda folder: "the head")


def test_schedules_are_judged_on_training_trajectories(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jobs, "refine", lambda *given, **more: asked.append(given))
    starts = (Schedule.explicit(STEPS, (0, 1, 4, 8)),)
    made = workload(schedule=SEARCHED)
    run_search_job(made, SearchJob("3x", starts), lambda *_: None)
    ((pipe, settings, data, begun),) = asked
    assert data is TRAIN and begun == starts and pipe == "the pipeline" and settings.search == made.search


def test_the_cheapest_path_is_that_of_training_trajectories(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def cheapest(data: Any, head: Any, counts: list[int], **given: Any) -> dict[int, Schedule]:
        asked.append((data, head, counts))
        return {4: Schedule.explicit(STEPS, (0, 1, 3, 8))}

    monkeypatch.setattr(jobs, "cheapest_schedules", cheapest)
    (job,) = cheapest_starts(workload(schedule=SEARCHED), None, lambda *_: None)
    assert len(asked) == 1 and asked[0][0] is TRAIN and asked[0][1:] == ("the head", [4])
    assert job.budget == "3x" and job.starts[0].full_steps == (0, 1, 3, 8) and torch.equal(TRAIN.sigmas, sigmas())
