"""What doctor says a stage will compute, held to what the stage's hooks count."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from lesa.doctor.estimate import estimate_costs
from lesa.evaluation.compare import evaluate_workload
from lesa.models.bill import Bill, counted
from lesa.models.pipelines import load_pipeline
from lesa.params import BudgetParams, ClosedLoopParams, EvaluateParams, ScheduleParams, SearchParams, Workload
from lesa.search.jobs import cheapest_starts, run_search_job, with_schedules
from lesa.search.schedules_file import write_schedules
from lesa.training.jobs import (
    closed_loop_budgets,
    finish,
    list_ground_truth_jobs,
    run_closed_loop_job,
    run_ground_truth_job,
)
from tests.helpers.model_kinds import prepare
from tests.helpers.recording import record
from tests.helpers.tiny import write_prompts

PROMPTS = {
    "train": ["a thin seven", "a bold two, top left", "a red house on the left", "the blue cat", "a dog", "the cat"],
    "validation": ["a dog on the left", "the white dog"],
    "test": ["a black cat", "a bold nine", "the red dog", "a thin house"],
}


def quiet(step: int, values: dict[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workload, dict[str, Bill]]]:
    """A workload that records, searches, trains and judges for real, and the bill of each stage."""
    root = tmp_path_factory.mktemp("billed")
    bills: dict[str, Bill] = {}

    @contextlib.contextmanager
    def billed(stage: str) -> Iterator[None]:
        with counted() as bills[stage]:
            yield

    with contextlib.chdir(root):
        given, _ = prepare(root, "flux-dev")
        write_prompts(root, PROMPTS)
        workload = dataclasses.replace(
            given,
            record=dataclasses.replace(given.record, train_prompts=6, validation_prompts=2),
            schedule=ScheduleParams(
                budgets={"fast": BudgetParams(num_full=3), "slow": BudgetParams(num_full=5)}, default_budget="fast"
            ),
            search=SearchParams(descents=1, evaluations=12, samples=2, finalists=1, max_gap=4),
            closed_loop=ClosedLoopParams(iterations=6, batch_size=2, checkpoint_every=2),
            evaluate=EvaluateParams(
                prompts=4,
                seeds_per_prompt=2,
                converged_fraction=0.5,
                converged_steps=20,
                batch_size=4,
                bootstrap=50,
                wall_clock_repeats=1,
            ),
        )
        with billed("record"):
            record(workload, load_pipeline(workload.model, "cpu"))
        with billed("search"):
            jobs = cheapest_starts(workload, None, quiet)
            found = {job.budget: run_search_job(workload, job, quiet) for job in jobs}
        write_schedules(workload.paths.schedules, workload.call.num_inference_steps, found)
        searched = with_schedules(workload)
        experts = {str(job): run_ground_truth_job(searched, job, quiet) for job in list_ground_truth_jobs(searched)}
        first = finish(searched, "ground_truth", experts)
        with billed("train_stage2"):
            tuned = {name: run_closed_loop_job(searched, name, quiet) for name in closed_loop_budgets(searched)}
        predictors: dict[str, Any] = {"lesa": finish(searched, "closed_loop", tuned), "lesa_ground_truth": first}
        with billed("evaluate"):
            results = evaluate_workload(searched, predictors)
        assert results.bills == {"evaluate": bills["evaluate"].to_dict()}
        yield workload, bills


@pytest.mark.parametrize(
    ("stage", "low", "high"),  # of what is counted over what is said
    [
        ("record", 1.0, 1.3),  # short runs that tell sizes are much of so small a recording
        ("search", 0.5, 1.1),  # a search that finds no better steps ends early
        ("train_stage2", 0.85, 1.15),
        ("evaluate", 0.5, 1.3),
    ],
)
def test_doctor_says_what_is_counted(
    made: tuple[Workload, dict[str, Bill]], stage: str, low: float, high: float
) -> None:
    workload, bills = made
    said = estimate_costs(workload).forwards(stage)
    assert low <= bills[stage].work / said <= high, (bills[stage], said)
