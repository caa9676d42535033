"""What the gate measures of some budgets: a job that loads what it needs and can run anywhere, here or on a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lesa.bundle import load_bundle
from lesa.default_methods import default_methods
from lesa.measuring import Report, evaluate_methods
from lesa.params import Workload
from lesa.pipelines import load_pipeline


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


def shared_out(costs: Mapping[str, float], parts: int) -> list[tuple[str, ...]]:
    """The names in at most so many parts of about the same cost: the dearest first, each to the cheapest part."""
    shared: list[list[str]] = [[] for _ in range(min(parts, len(costs)))]
    for name in sorted(costs, key=lambda name: -costs[name]):
        min(shared, key=lambda part: sum(costs[each] for each in part)).append(name)
    return [tuple(part) for part in shared]


def measure_budgets(workload: Workload, job: GateJob, report: Report) -> dict[str, dict[str, list[float]]]:
    """PSNR in dB of every sample, by budget, for the bundles and every peer.

    Raises:
        BundleError: a bundle is not what it was when it was registered.
        ValueError: a champion that cannot serve the candidate's schedule.
    """
    bundles = {each.name: load_bundle(each.folder, expected_digest=each.digest) for each in job.bundles}
    manifest = next(iter(bundles.values())).manifest
    settings = dataclasses.replace(workload.evaluate, converged_fraction=0.0)
    pipe = load_pipeline(workload)
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
