"""Every stage computes with the threads of its own settings, also where it has one worker: its process's own work."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flows import evaluate, publish, search, train_stage1, train_stage2
from flows.registry import promotion
from flows.tracking.run import Reporter
from lesa.params import WorkerResources, Workload
from lesa.schedule import Schedule
from lesa.search.jobs import SearchJob
from tests.helpers.training_set import STEPS
from tests.helpers.training_set import workload as toy

THREADS = 3
Noted = Callable[..., Callable[..., Any]]
RUN: Any = SimpleNamespace(
    reporter=Reporter(path=Path(os.devnull), name="tests"), note=lambda step, values: None, curves=lambda: []
)
TRAINED = SimpleNamespace(figures={})


@pytest.fixture(autouse=True)
def _one_thread_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def searches(patch: pytest.MonkeyPatch, noted: Noted, workload: Workload) -> None:
    found = Schedule.explicit(STEPS, (0, 1, 2, 5))
    patch.setattr("lesa.search.jobs.cheapest_starts", noted([SearchJob("2x", (found,))]))
    patch.setattr("lesa.search.jobs.run_search_job", noted((found, {})))
    search.find.fn(workload, RUN)


def trains_on_true_histories(patch: pytest.MonkeyPatch, noted: Noted, workload: Workload) -> None:
    patch.setattr("lesa.training.jobs.list_ground_truth_jobs", lambda workload: [SimpleNamespace(budget="2x")])
    patch.setattr("lesa.training.jobs.run_ground_truth_job", noted(TRAINED))
    patch.setattr("lesa.training.jobs.finish", lambda *arguments: None)
    train_stage1.train.fn(workload, RUN)


def trains_in_the_closed_loop(patch: pytest.MonkeyPatch, noted: Noted, workload: Workload) -> None:
    patch.setattr("lesa.training.jobs.run_closed_loop_job", noted(TRAINED))
    patch.setattr("lesa.training.jobs.finish", lambda *arguments: None)
    train_stage2.train.fn(workload, RUN)


def evaluates(patch: pytest.MonkeyPatch, noted: Noted, workload: Workload) -> None:
    def evaluated(workload: Workload, predictors: Any, training: Any, run: Any, bills: Any) -> Any:
        run(noted(None), workload, {"samples": None})
        return SimpleNamespace(metrics=dict)

    patch.setattr("lesa.training.jobs.load_predictor", lambda folder: None)
    patch.setattr("lesa.evaluation.table.format_table", lambda results: "")
    patch.setattr("lesa.evaluation.compare.evaluate_workload", evaluated)
    workload.paths.report.mkdir(parents=True)
    evaluate.judge.fn(workload, RUN)


def calibrates_error_bounds(patch: pytest.MonkeyPatch, noted: Noted, workload: Workload) -> None:
    patch.setattr(publish, "measure_bounds", noted({"2x": [None]}))
    assert publish.measured_bounds(workload) == {"2x": [None]}


def judges_for_the_gate(patch: pytest.MonkeyPatch, noted: Noted, workload: Workload) -> None:
    def judged(workload: Workload, candidate: Any, champion: Any, run: Any, log: Any) -> None:
        run(noted(None), workload, {"caches": None})
        run(noted(None), workload, {"samples": None})

    patch.setattr(promotion, "judge_candidate", judged)
    bundle: Any = None
    promotion.measure_and_decide(workload, bundle, None, logging.getLogger("tests"))


@pytest.mark.parametrize(
    ("section", "stage", "jobs"),
    [
        ("search", searches, 2),
        ("ground_truth", trains_on_true_histories, 1),
        ("closed_loop", trains_in_the_closed_loop, 1),
        ("evaluate", evaluates, 1),
        ("publish", calibrates_error_bounds, 1),
        ("publish", judges_for_the_gate, 2),
    ],
)
def test_one_worker_computes_with_the_threads_of_its_stage(
    section: str, stage: Callable[..., None], jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def noted(result: Any) -> Callable[..., Any]:
        def work(workload: Workload, job: Any, report: Any) -> Any:
            seen.append(torch.get_num_threads())
            return result

        return work

    share = WorkerResources(workers=1, threads_per_worker=THREADS)
    stage(monkeypatch, noted, toy(resources={section: share}))
    assert seen == [THREADS] * jobs
