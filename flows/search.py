"""Stage `search`: where the full steps of each budget stand, for budgets that give only their number.

python -m flows.search [--workload NAME]
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flows.prefect_flow import flow, task
from flows.ray_jobs import run_jobs
from flows.stage import billed, final_values, read_workload, stage_main, stage_run
from flows.tracking.run import Tracker
from lesa.params import Workload


@flow(name="search")
def search(workload: str | None = None) -> dict[str, Any]:
    """Search the full steps of every budget that gives only their number."""
    settings = read_workload(workload)
    with stage_run("search", settings, ("search", "predictor", "schedule", "seed")) as run:
        return find(settings, run)


@task(name="search schedules")
def find(workload: Workload, run: Tracker) -> dict[str, Any]:
    """The cheapest paths first, then one job a budget."""
    from lesa.search.jobs import cheapest_starts, clear_searches, run_search_job
    from lesa.search.schedules_file import write_schedules

    share = workload.resources.search
    alone = dataclasses.replace(share, workers=1)
    with billed("search", workload):
        starts = run_jobs(cheapest_starts, workload, {"paths": None}, share=alone, reporter=run.reporter)["paths"]
        found = run_jobs(
            run_search_job,
            workload,
            {job.budget: job for job in starts},
            share=share,
            reporter=run.reporter,
        )
    write_schedules(workload.paths.schedules, workload.call.num_inference_steps, found)
    clear_searches(workload)
    figures = {name: values for name, (_, values) in found.items()}
    run.note(workload.search.descents * workload.search.evaluations, final_values(figures))
    return {name: {"full_steps": list(schedule.full_steps), **values} for name, (schedule, values) in found.items()}


if __name__ == "__main__":
    raise SystemExit(stage_main(search))
