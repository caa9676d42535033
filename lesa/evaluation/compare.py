"""The two judgements people ask for: a workload's own predictors with a report, and a bundle on a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa.bundle import Bundle
from lesa.evaluation.aggregate import gather
from lesa.evaluation.measure import MeasuredPart, Part, Scorer, check, measure_part, samples, share_out
from lesa.evaluation.results import Results
from lesa.models.bill import counted
from lesa.models.pipelines import load_pipeline, release_memory
from lesa.params import CallParams, EvaluateParams, Report, Workload
from lesa.peers.caches import CACHES, tuned_caches
from lesa.peers.lineup import by_budget, default_methods, peer_methods, predictor_methods
from lesa.peers.method import Method, lesa_method
from lesa.peers.tuning import TUNING_SAMPLES
from lesa.predictor.predictor import Predictor
from lesa.recording.prompts import PromptError, prompt_digests, read_splits
from lesa.sampling.enable import disable, enable


def evaluate_methods(
    pipe: Any,
    methods: Sequence[Method],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    call: CallParams,
    settings: EvaluateParams,
    scorer: Scorer | None = None,
    report: Report | None = None,
    timing: bool = True,
    about: Mapping[str, Any] | None = None,
) -> Results:
    """Measure methods on the same samples.

    Args:
        pipe: the pipeline, with nothing enabled on it.
        methods: what is compared; names must differ within a budget.
        prompts: one a sample.
        seeds: noise of each sample.
        call: the plain run.
        settings: batch size, resamples, converged run, timed repeats.
        scorer: None leaves the column out.
        report: called after every batch with the number of samples done.
        timing: whether wall-clock ratios are wanted, at the cost of further runs where batches are few.
        about: what is judged, for the reader of the results.

    Raises:
        ValueError: no samples, prompts and seeds that do not match, a seed twice, methods of one name.
    """
    check(methods, prompts, seeds)
    (part,) = share_out(len(prompts), settings, timing=timing)
    measured = measure_part(
        pipe, methods, prompts, seeds, part, call=call, settings=settings, scorer=scorer, report=report
    )
    return gather([measured], methods, prompts, seeds, call=call, settings=settings, about=about)


# (work, workload, jobs by name) -> what `work(workload, job, report)` returned for each
Runner = Callable[[Callable[[Workload, Any, Report], Any], Workload, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class TuneJob:
    """Settings of threshold caches, at all budgets."""

    caches: tuple[str, ...]  # of `lesa.peers.caches.CACHES`; together they share the plain run and the timing of ours
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
        load_pipeline(workload.model, workload.resources.device),
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
        load_pipeline(workload.model, workload.resources.device),
        job.methods,
        job.prompts,
        job.seeds,
        job.part,
        call=workload.call,
        settings=workload.evaluate,
        scorer=load_scorer(workload.scorer),
        report=report,
    )


def load_scorer(folder: str | None) -> Scorer | None:
    """The scorer of a folder, as a workload names it; None where it names none."""
    if folder is None:
        return None
    from lesa.base_models.scorer import load_scorer as load

    return load(Path(folder))


def one_by_one(
    work: Callable[[Workload, Any, Report], Any], workload: Workload, jobs: Mapping[str, Any]
) -> dict[str, Any]:
    """Runs jobs in this process, in turn, without a word."""
    results = {}
    for name, job in jobs.items():
        results[name] = work(workload, job, lambda step, values: None)
        release_memory()
    return results


def evaluate_workload(
    workload: Workload,
    predictors: Mapping[str, Predictor],
    training: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    run: Runner = one_by_one,
    bills: Mapping[str, Mapping[str, float]] | None = None,
) -> Results:
    """Judge predictors on the workload's held-out prompts with fresh seeds, and write the report.

    The caches are tuned and the batches measured by jobs that load the workload's pipeline, under the same
    conditions, since the caches are given the predictor's time.

    Args:
        workload: its settings.
        predictors: by name; "lesa" first.
        training: curves of the closed loop for the report, budget -> [(optimiser step, loss)].
        run: runs jobs, `resources.evaluate.workers` of them at once if it can; by default one after the other, here.
        bills: of the stages that made the predictors, for the report.

    Raises:
        PromptError: splits that overlap, or fewer test prompts than are to be judged.
    """
    splits = read_splits(workload.paths.prompts)
    settings, budgets = workload.evaluate, workload.budgets()
    if len(splits["test"]) < settings.prompts:
        raise PromptError(
            f"evaluate.prompts: {settings.prompts} test prompts are wanted, "
            f"{workload.paths.prompts}/test.txt has {len(splits['test'])}"
        )
    ours = predictor_methods(predictors, budgets)
    workers = workload.resources.evaluate.workers
    together = [CACHES] if workers == 1 else [(cache,) for cache in CACHES]
    tunings = {" ".join(caches): TuneJob(caches=caches, predictor=predictors["lesa"]) for caches in together}
    with counted() as tuning:
        caches = run(tune, workload, tunings)
    peers = [*peer_methods(budgets), *(method for tuned in caches.values() for method in tuned)]
    methods = by_budget([*ours, *peers], budgets)
    prompts, seeds = samples(
        splits["test"][: settings.prompts], settings.seeds_per_prompt, settings.seed_offset
    )
    check(methods, prompts, seeds)
    jobs = {
        f"part{index}": MeasureJob(methods=methods, prompts=prompts, seeds=seeds, part=part)
        for index, part in enumerate(share_out(len(prompts), settings, workers))
    }
    with counted() as measuring:
        measured = list(run(measure_samples, workload, jobs).values())
    results = gather(
        measured,
        methods,
        prompts,
        seeds,
        call=workload.call,
        settings=settings,
        about={"workload": workload.name, "default_budget": workload.schedule.default_budget},
    )
    tuning.add(measuring)
    results = dataclasses.replace(results, bills={**(bills or {}), "evaluate": tuning.to_dict()})
    from lesa.evaluation.report import write_report  # matplotlib: only here

    write_report(results, workload.paths.report, training)
    return results


def compare(
    bundle: Bundle,
    pipe: Any,
    prompts: Sequence[str],
    seeds_per_prompt: int,
    seed_offset: int,
    *,
    tuning_prompts: Sequence[str] = (),
    further: Sequence[Method] = (),
    settings: EvaluateParams | None = None,
    scorer: Scorer | None = None,
    report: Report | None = None,
) -> Results:
    """A bundle against every peer at each of its budgets.

    Args:
        bundle: a verified bundle.
        pipe: the pipeline it was made for, with nothing enabled.
        prompts: distinct, none of them a training prompt of the bundle.
        seeds_per_prompt: noise seeds of each.
        seed_offset: the first seed.
        tuning_prompts: prompts that the threshold caches may be tuned on; empty leaves the caches out.
        further: more methods to measure, at budgets of the bundle.
        settings: batch size, resamples, converged run, timed repeats.
        scorer: None leaves the column out.
        report: called with progress.

    Raises:
        PromptError: prompts that the bundle was trained on, or that peers are tuned on.
        MismatchError: the pipeline is not what the bundle was made for.
    """
    manifest = bundle.manifest
    refuse_trained(prompts, manifest.data.get("training", {}))
    if shared := sorted(set(prompts) & set(tuning_prompts)):
        raise PromptError(f"{len(shared)} prompts are both judged and tuned on, e.g. {shared[0][:60]!r}")
    enable(pipe, bundle)  # refuses a pipeline that does not fit, before anything is computed
    disable(pipe)
    settings = EvaluateParams() if settings is None else settings
    texts, seeds = samples(prompts, seeds_per_prompt, seed_offset)
    methods = default_methods(
        pipe,
        {"lesa": bundle.predictor},
        {name: budget.schedule for name, budget in manifest.budgets.items()},
        call=manifest.call,
        settings=settings,
        tuning_prompts=list(tuning_prompts),
        tuning_seeds=[seed_offset + len(texts) + i for i in range(len(tuning_prompts))],
        report=report,
    )
    return evaluate_methods(
        pipe,
        [*methods, *further],
        texts,
        seeds,
        call=manifest.call,
        settings=settings,
        scorer=scorer,
        report=report,
        about={"workload": manifest.workload, "default_budget": manifest.default_budget, "bundle": bundle.digest},
    )


def refuse_trained(prompts: Sequence[str], training: Mapping[str, Any]) -> None:
    """`PromptError` naming the prompts that a manifest's training digests contain."""
    trained = set(training.get("prompt_digests", ()))
    seen = [prompt for prompt in prompts if prompt_digests([prompt])[0] in trained]
    if seen:
        raise PromptError(
            f"{len(seen)} of {len(prompts)} prompts were trained on, e.g. {seen[0][:60]!r}: "
            "judge on prompts that the bundle has not seen"
        )
