"""Error bounds of some budgets: a job that loads what it needs and can run anywhere, here or on a cluster."""

from __future__ import annotations

from collections.abc import Sequence

from lesa.error_bounds import bounds_by_budget
from lesa.jobs import load_predictor, recorded_splits
from lesa.loop import Report
from lesa.params import Workload
from lesa.pipelines import load_pipeline


def measure_bounds(workload: Workload, budgets: Sequence[str], report: Report) -> dict[str, list[float | None]]:
    """The bound of each full step of these budgets, with the predictor of the second training step.

    Raises:
        ValueError: predictor or trajectories are missing or not what was written.
    """
    train, validation = recorded_splits(workload)  # not kept: a process has one such job
    predictor = load_predictor(workload.paths.closed_loop)
    return bounds_by_budget(load_pipeline(workload), workload, predictor, train, validation, budgets, report)
