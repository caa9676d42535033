"""Stage `train_stage1`: every expert learns from true histories.

python -m flows.train_stage1 [--workload NAME]
"""

from __future__ import annotations

from typing import Any

from flows.prefect_flow import flow, task
from flows.ray_jobs import run_jobs
from flows.stage import final_values, metrics_folder, read_workload, stage_main, stage_run, write_curves
from flows.tracking.run import Tracker
from lesa.params import Workload
from lesa.predictor.spec import MIXED


@flow(name="train_stage1")
def train_stage1(workload: str | None = None) -> dict[str, Any]:
    """Train every expert on true histories (ground-truth guided)."""
    settings = read_workload(workload, searched=True)
    with stage_run("train_stage1", settings, ("predictor", "ground_truth", "schedule", "seed")) as run:
        return train(settings, run)


@task(name="train experts")
def train(workload: Workload, run: Tracker) -> dict[str, Any]:
    """One job an expert, side by side as far as the settings allow."""
    from lesa.training.jobs import finish, list_ground_truth_jobs, run_ground_truth_job

    # Those for other numbers of steps take longest and come first.
    listed = sorted(list_ground_truth_jobs(workload), key=lambda job: job.budget != MIXED)
    jobs = {str(job): job for job in listed}
    done = run_jobs(
        run_ground_truth_job,
        workload,
        jobs,
        share=workload.resources.ground_truth,
        reporter=run.reporter,
    )
    figures = {name: trained.figures for name, trained in done.items()}
    finish(workload, "ground_truth", done)
    write_curves(metrics_folder(workload) / "train_stage1.csv", run.curves())
    run.note(workload.ground_truth.iterations, final_values(figures))
    return figures


if __name__ == "__main__":
    raise SystemExit(stage_main(train_stage1))
