"""Error bounds as jobs that may run side by side, some budgets each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lesa.models.pipelines import load_pipeline
from lesa.params import Report, Workload
from lesa.predictor.predictor import Predictor
from lesa.publishing.calibration import calibrated_bounds
from lesa.recording.dataset import Trajectories, recorded_splits
from lesa.sampling.binding import LazyPredictor
from lesa.training.jobs import load_predictor


def shared_out(costs: Mapping[str, float], parts: int) -> list[tuple[str, ...]]:
    """The names in at most so many parts of about the same cost: the dearest first, each to the cheapest part."""
    shared: list[list[str]] = [[] for _ in range(min(parts, len(costs)))]
    for name in sorted(costs, key=lambda name: -costs[name]):
        min(shared, key=lambda part: sum(costs[each] for each in part)).append(name)
    return [tuple(part) for part in shared]


def measure_bounds(workload: Workload, budgets: Sequence[str], report: Report) -> dict[str, list[float | None]]:
    """The bound of each full step of these budgets, with the predictor of the second training step.

    Raises:
        ValueError: predictor or trajectories are missing or not what was written.
    """
    train, validation = recorded_splits(workload.recording)  # not kept: a process has one such job
    predictor = load_predictor(workload.paths.closed_loop)
    pipe = load_pipeline(workload.model, workload.resources.device)
    return bounds_by_budget(pipe, workload, predictor, train, validation, budgets, report)


def bounds_by_budget(
    pipe: Any,
    workload: Workload,
    predictor: Predictor,
    train: Trajectories,
    validation: Trajectories,
    budgets: Collection[str] | None = None,
    report: Report = lambda step, values: None,
) -> dict[str, list[float | None]]:
    """`calibrated_bounds` of these budgets of the workload, of all where none are named.

    Args:
        report: told after each budget how many are done, and how many of its full steps have a bound.
    """
    schedules = workload.budgets()
    bounds: dict[str, list[float | None]] = {}
    for name in schedules if budgets is None else budgets:
        bounds[name] = calibrated_bounds(
            pipe,
            workload.call,
            schedules[name],
            LazyPredictor(predictor, schedules[name], validation.sigmas),
            validation,
            train,
            batch_size=workload.evaluate.batch_size,
            samples=workload.publish.bound_samples,
        )
        report(len(bounds), {"bounds": sum(bound is not None for bound in bounds[name])})
    return bounds
