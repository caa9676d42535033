"""Stage `train_stage2`: the experts of every budget learn from the states their own predictions lead to.

python -m flows.train_stage2 [--workload NAME]
"""

from __future__ import annotations

from typing import Any

from flows.prefect_flow import flow, task
from flows.ray_jobs import run_jobs
from flows.stage import billed, final_values, metrics_folder, read_workload, stage_main, stage_run, write_curves
from flows.tracking.run import Tracker
from lesa.params import Workload


@flow(name="train_stage2")
def train_stage2(workload: str | None = None) -> dict[str, Any]:
    """Train the experts of every budget in the closed loop of the sampler."""
    settings = read_workload(workload, searched=True)
    with stage_run("train_stage2", settings, ("predictor", "closed_loop", "schedule", "seed")) as run:
        return train(settings, run)


@task(name="train budgets")
def train(workload: Workload, run: Tracker) -> dict[str, Any]:
    """One job a budget and one for other numbers of steps, side by side as far as the settings allow."""
    from lesa.training.jobs import closed_loop_budgets, finish, run_closed_loop_job

    with billed("train_stage2", workload):
        done = run_jobs(
            run_closed_loop_job,
            workload,
            {budget: budget for budget in closed_loop_budgets(workload)},
            share=workload.resources.closed_loop,
            reporter=run.reporter,
        )
    figures = {budget: trained.figures for budget, trained in done.items()}
    finish(workload, "closed_loop", done)
    write_curves(metrics_folder(workload) / "train_stage2.csv", run.curves())
    run.note(workload.closed_loop.iterations, final_values(figures))
    return figures


if __name__ == "__main__":
    raise SystemExit(stage_main(train_stage2))
