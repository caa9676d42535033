"""Stage `evaluate`: both training steps' predictors against every peer, on held-out prompts; the report.

python -m flows.evaluate [--workload NAME]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flows.prefect_flow import flow, task
from flows.ray_jobs import kept_workers, run_jobs
from flows.stage import final_values, metrics_folder, read_bills, read_curves, read_workload, stage_main, stage_run
from flows.tracking.run import Tracker
from lesa.atomic import write_bytes
from lesa.params import Workload


@flow(name="evaluate")
def evaluate(workload: str | None = None) -> dict[str, Any]:
    """Judge the predictors against every peer and write the report."""
    settings = read_workload(workload, searched=True)
    with stage_run("evaluate", settings, ("evaluate", "schedule", "call")) as run:
        return judge(settings, run)


@task(name="judge")
def judge(workload: Workload, run: Tracker) -> dict[str, Any]:
    """The report folder is written as a whole; its numbers go to the run."""
    from lesa.evaluation.compare import evaluate_workload
    from lesa.evaluation.table import format_table
    from lesa.training.jobs import load_predictor

    predictors = {
        "lesa": load_predictor(workload.paths.closed_loop),
        "lesa_ground_truth": load_predictor(workload.paths.ground_truth),
    }
    share, curves = workload.resources.evaluate, read_curves(metrics_folder(workload) / "train_stage2.csv")

    def side_by_side(work: Callable[..., Any], settings: Workload, jobs: Mapping[str, Any]) -> dict[str, Any]:
        return run_jobs(work, settings, jobs, share=share, reporter=run.reporter)

    with kept_workers(share):
        results = evaluate_workload(
            workload, predictors, training=curves, run=side_by_side, bills=read_bills(workload)
        )
    metrics = results.metrics()
    run.note(0, final_values(metrics))
    table = format_table(results)
    write_bytes(workload.paths.report / "table.txt", f"{table}\n".encode())
    print(table, flush=True)
    return {"report": str(workload.paths.report / "index.html")}


if __name__ == "__main__":
    raise SystemExit(stage_main(evaluate))
