"""Searched schedules for the LESA form, whose experts want two full steps before they predict."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results_files import changed
from lesa.atomic import write_json
from lesa.params import BudgetParams, Workload
from lesa.schedule import Schedule
from lesa.search.jobs import cheapest_starts, run_search_job


def lesa_schedules(workload: Workload, counts: Sequence[int]) -> dict[int, Schedule]:
    """One for each number of full steps, searched as the search stage does; kept in a file."""
    path = Path("data/benchmarks") / workload.name / "lesa_schedules.json"
    steps = workload.call.num_inference_steps
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [count for count in counts if str(count) not in known]
    if missing:
        budgets = {str(count): BudgetParams(num_full=count) for count in missing}
        setting = dataclasses.replace(
            changed(workload, {"predictor": {"kind": "lesa", "history_sizes": (2, 2, 2)}}),
            schedule=dataclasses.replace(workload.schedule, budgets=budgets, default_budget=str(missing[0])),
        )
        for job in cheapest_starts(setting, None, lambda *_: None):
            schedule, figures = run_search_job(setting, job, lambda *_: None)
            known[job.budget] = list(schedule.full_steps)
            print(f"LESA form, {job.budget}: {known[job.budget]} {figures}", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return {count: Schedule.explicit(steps, known[str(count)]) for count in counts}
