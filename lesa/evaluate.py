"""The two judgements people ask for: a workload's own predictors with a report, and a bundle on a
pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lesa.acceleration import disable, enable
from lesa.bundle import Bundle
from lesa.cache_search import CACHES
from lesa.default_methods import by_budget, default_methods, peer_methods, predictor_methods
from lesa.evaluate_jobs import MeasureJob, Runner, TuneJob, measure_samples, one_by_one, tune
from lesa.gathering import gather
from lesa.measured import share_out
from lesa.measuring import Report, Scorer, check, evaluate_methods, samples
from lesa.methods import Method
from lesa.params import EvaluateParams, Workload
from lesa.predictor import Predictor
from lesa.prompts import PromptError, prompt_digests, read_splits
from lesa.results import Results

__all__ = ["compare", "evaluate_methods", "evaluate_workload", "samples"]


def evaluate_workload(
    workload: Workload,
    predictors: Mapping[str, Predictor],
    training: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    run: Runner = one_by_one,
) -> Results:
    """Judge predictors on the workload's held-out prompts with fresh seeds, and write the report.

    The caches are tuned and the batches measured by jobs that load the workload's pipeline, under the same
    conditions, since the caches are given the predictor's time.

    Args:
        workload: its settings.
        predictors: by name; "lesa" first.
        training: curves of the closed loop for the report, budget -> [(optimiser step, loss)].
        run: runs jobs, `evaluate.workers` of them at once if it can; by default one after the other, here.

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
    together = [CACHES] if settings.workers == 1 else [(cache,) for cache in CACHES]
    tunings = {" ".join(caches): TuneJob(caches=caches, predictor=predictors["lesa"]) for caches in together}
    caches = run(tune, workload, tunings)
    peers = [*peer_methods(budgets), *(method for found in caches.values() for method in found)]
    methods = by_budget([*ours, *peers], budgets)
    prompts, seeds = samples(
        splits["test"][: settings.prompts], settings.seeds_per_prompt, settings.seed_offset
    )
    check(methods, prompts, seeds)
    jobs = {
        f"part{index}": MeasureJob(methods=methods, prompts=prompts, seeds=seeds, part=part)
        for index, part in enumerate(share_out(len(prompts), settings, settings.workers))
    }
    results = gather(
        list(run(measure_samples, workload, jobs).values()),
        methods,
        prompts,
        seeds,
        call=workload.call,
        settings=settings,
        about={"workload": workload.name, "default_budget": workload.schedule.default_budget},
    )
    from lesa.report import write_report  # matplotlib: only here

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
    tuning = list(tuning_prompts)
    texts, seeds = samples(prompts, seeds_per_prompt, seed_offset)
    methods = default_methods(
        pipe,
        {"lesa": bundle.predictor},
        {name: budget.schedule for name, budget in manifest.budgets.items()},
        call=manifest.call,
        settings=settings,
        tuning_prompts=tuning,
        tuning_seeds=[seed_offset + len(texts) + i for i in range(len(tuning))],
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
        about={
            "workload": manifest.workload,
            "default_budget": manifest.default_budget,
            "bundle": bundle.digest,
        },
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
