"""An evaluation cut into jobs that load what they need and can run anywhere, here or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa.cache_search import tuned_caches
from lesa.measured import MeasuredPart, Part
from lesa.measuring import Report, Scorer, measure_part
from lesa.methods import Method, lesa_method
from lesa.params import Workload
from lesa.pipelines import load_pipeline, release_memory
from lesa.predictor import Predictor
from lesa.prompts import read_splits

TUNING_SAMPLES = 16  # training prompts that the peers' thresholds are tuned on

# (work, workload, jobs by name) -> what `work(workload, job, report)` returned for each
Runner = Callable[[Callable[[Workload, Any, Report], Any], Workload, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class TuneJob:
    """Settings of threshold caches, at all budgets."""

    caches: tuple[str, ...]  # of `lesa.cache_search.CACHES`; together they share the plain run and the timing of ours
    predictor: Predictor  # whose time is the measure


@dataclass(frozen=True, kw_only=True)
class MeasureJob:
    """Some batches of the samples, by every method."""

    methods: Sequence[Method]
    prompts: Sequence[str]  # one a sample, of all samples
    seeds: Sequence[int]
    part: Part


def tune(workload: Workload, job: TuneJob, report: Report) -> list[Method]:
    """The caches at their best settings for every budget, on training prompts with training noise.

    Training noise, on purpose: what the peers are tuned on must not be what anybody is judged on.
    """
    tuning = read_splits(workload.paths.prompts)["train"][:TUNING_SAMPLES]
    return tuned_caches(
        load_pipeline(workload),
        {budget: lesa_method(budget, job.predictor, schedule) for budget, schedule in workload.budgets().items()},
        call=workload.call,
        prompts=tuning,
        seeds=[workload.record.seed_offset + index for index in range(len(tuning))],
        batch_size=workload.evaluate.batch_size,
        repeats=workload.evaluate.wall_clock_repeats,
        caches=job.caches,
        report=report,
    )


def measure_samples(workload: Workload, job: MeasureJob, report: Report) -> MeasuredPart:
    """What every method does on the job's samples, as the workload's scorer reads them too."""
    return measure_part(
        load_pipeline(workload),
        job.methods,
        job.prompts,
        job.seeds,
        job.part,
        call=workload.call,
        settings=workload.evaluate,
        scorer=load_scorer(workload),
        report=report,
    )


def load_scorer(workload: Workload) -> Scorer | None:
    """The workload's scorer; None where it names none."""
    if workload.scorer is None:
        return None
    from lesa.reference.scorer import load_scorer as load

    return load(Path(workload.scorer))


def one_by_one(
    work: Callable[[Workload, Any, Report], Any], workload: Workload, jobs: Mapping[str, Any]
) -> dict[str, Any]:
    """Runs jobs in this process, in turn, without a word."""
    results = {}
    for name, job in jobs.items():
        results[name] = work(workload, job, lambda step, values: None)
        release_memory()
    return results
