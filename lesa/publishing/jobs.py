"""Publishing as jobs that may run side by side: error bounds, and what the gate decides on, for some budgets each."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa.bundle import Bundle, load_bundle
from lesa.errors import LesaError
from lesa.evaluation.compare import evaluate_methods
from lesa.models.pipelines import load_pipeline
from lesa.params import Report, Workload
from lesa.peers.lineup import default_methods
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
    train, validation = recorded_splits(workload)  # not kept: a process has one such job
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


@dataclass(frozen=True, kw_only=True)
class NamedBundle:
    """A bundle on disk under the name it has among the methods."""

    name: str
    folder: Path
    digest: str  # SHA-256 of its manifest: what was judged is what is promoted


@dataclass(frozen=True, kw_only=True)
class GateJob:
    """Some budgets of a candidate, on given samples; they share the plain run and what tuning the caches tries."""

    budgets: tuple[str, ...]
    bundles: tuple[NamedBundle, ...]  # the candidate first: its schedule, its call
    prompts: Sequence[str]  # one a sample
    seeds: Sequence[int]
    tuning_prompts: Sequence[str]  # training prompts that peers with a threshold are tuned on
    tuning_seeds: Sequence[int]


def measure_budgets(workload: Workload, job: GateJob, report: Report) -> dict[str, dict[str, list[float]]]:
    """PSNR in dB of every sample, by budget, for the bundles and every peer.

    Raises:
        BundleError: a bundle is not what it was when it was registered.
        ValueError: a champion that cannot serve the candidate's schedule.
    """
    bundles = {each.name: load_bundle(each.folder, expected_digest=each.digest) for each in job.bundles}
    manifest = next(iter(bundles.values())).manifest
    settings = dataclasses.replace(workload.evaluate, converged_fraction=0.0)
    pipe = load_pipeline(workload.model, workload.resources.device)
    methods = default_methods(
        pipe,
        {name: bundle.predictor for name, bundle in bundles.items()},
        {budget: manifest.budgets[budget].schedule for budget in job.budgets},
        call=manifest.call,
        settings=settings,
        tuning_prompts=job.tuning_prompts,
        tuning_seeds=job.tuning_seeds,
        report=report,
    )
    results = evaluate_methods(
        pipe, methods, job.prompts, job.seeds, call=manifest.call, settings=settings, report=report, timing=False
    )
    return {
        budget: {row.method: results.values(budget, row.method, "psnr").tolist() for row in results.at(budget)}
        for budget in job.budgets
    }


def fresh_offset(workload: Workload, candidate: Bundle, champion: Bundle | None) -> int:
    """First noise seed of this judgement: new for every pair of bundles, and repeatable for one.

    It lies far above the seeds of recording and evaluation; were it the same every time, a long line of
    candidates would be chosen for the luck they have with it.
    """
    pair = f"{candidate.digest}/{champion.digest if champion else ''}"
    block = int.from_bytes(hashlib.sha256(pair.encode()).digest()[:3], "big")
    start = workload.publish.gate_seed_offset + (1 << 32) + block * (1 << 16)
    used = max(workload.record.seed_offset, workload.evaluate.seed_offset) + (1 << 24)
    if start < used:
        raise LesaError("record.seed_offset and evaluate.seed_offset: must be below 4,000,000,000")
    return start
