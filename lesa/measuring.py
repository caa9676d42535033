"""Judging: every method on the same prompts and noise, beside the plain run and beside a converged one.

Paired by construction: a batch is sampled plain, then by each method, before the next batch begins. The
first batch is also looked into (features, bytes, shapes) and is the warm-up; the others are timed, each
method against the plain call of its own batch.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from lesa import metrics
from lesa.cache_search import tuned_caches
from lesa.fixed_peers import fixed_peers
from lesa.flops import ModelFlops, count_transformer
from lesa.methods import Method, lesa_method
from lesa.params import CallParams, EvaluateParams
from lesa.pipelines import sample
from lesa.predictor import Predictor
from lesa.probe import RunTrace, probe
from lesa.results import Estimate, Results, Row, Samples, estimate
from lesa.schedule import Schedule
from lesa.timing import timed_sample

Report = Callable[[int, dict[str, float]], None]
PLAIN = ("", "plain")
_LABELS = {"lesa": "LESA", "lesa_ground_truth": "LESA, ground truth only", "champion": "champion"}


class Scorer(Protocol):
    """Reads whether pictures show what was asked for."""

    def agreement(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """[B] of each picture [B, 3, H, W] in [0, 1]."""
        ...


@dataclasses.dataclass(slots=True)
class _Measured:
    """What is gathered of one method while batches pass."""

    psnr: list[torch.Tensor] = dataclasses.field(default_factory=list)
    ssim: list[torch.Tensor] = dataclasses.field(default_factory=list)
    agreement: list[torch.Tensor] = dataclasses.field(default_factory=list)
    kept: list[torch.Tensor] = dataclasses.field(default_factory=list)  # pictures with a converged run
    first: torch.Tensor | None = None  # pictures of the first batch
    trace: RunTrace = dataclasses.field(default_factory=RunTrace)  # of the first batch
    calls: int = 0
    computed: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)  # of timed calls, plain ones in step


def samples(prompts: Sequence[str], seeds_per_prompt: int, seed_offset: int) -> tuple[list[str], list[int]]:
    """A prompt and a noise seed for every sample: prompts in order, each with seeds no other sample has."""
    if seeds_per_prompt < 1:
        raise ValueError(f"seeds_per_prompt must be at least 1, got {seeds_per_prompt}")
    repeated = [prompt for prompt in prompts for _ in range(seeds_per_prompt)]
    return repeated, list(range(seed_offset, seed_offset + len(repeated)))


def default_methods(
    pipe: Any,
    predictors: Mapping[str, Predictor],
    budgets: Mapping[str, Schedule],
    *,
    call: CallParams,
    settings: EvaluateParams,
    tuning_prompts: Sequence[str] = (),
    tuning_seeds: Sequence[int] = (),
    report: Report | None = None,
) -> list[Method]:
    """The predictors and every peer, at every budget.

    Args:
        pipe: the pipeline; only the tuning of caches samples with it.
        predictors: by name; the first one is the measure for the caches' time.
        budgets: full steps of each budget.
        call: the plain run.
        settings: batch size and repeats.
        tuning_prompts: training prompts, one a sample, for the caches; empty leaves the caches out.
        tuning_seeds: their noise.
        report: progress of the tuning.
    """
    ours: list[Method] = []
    for budget, schedule in budgets.items():
        for name, predictor in predictors.items():
            label = _LABELS.get(name, name)
            ours.append(lesa_method(budget, predictor, schedule, name=name, label=label))
    peers = [method for budget, schedule in budgets.items() for method in fixed_peers(budget, schedule)]
    caches: list[Method] = []
    if tuning_prompts and ours:
        first = next(iter(predictors))
        caches = tuned_caches(
            pipe,
            {method.budget: method for method in ours if method.name == first},
            call=call,
            prompts=tuning_prompts,
            seeds=tuning_seeds,
            batch_size=settings.batch_size,
            repeats=settings.wall_clock_repeats,
            report=report,
        )
    everything = [*ours, *peers, *caches]
    return [method for budget in budgets for method in everything if method.budget == budget]


@torch.no_grad()
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
    _check(methods, prompts, seeds)
    keys = [(method.budget, method.name) for method in methods]
    measured = {key: _Measured() for key in (PLAIN, *keys)}
    converged_at = _converged_indices(len(prompts), settings.converged_fraction)
    size = settings.batch_size
    starts = range(0, len(prompts), size)
    sigmas = torch.empty(0)
    for start in starts:
        chunk = slice(start, min(start + size, len(prompts)))
        is_first, wanted = start == 0, [i - start for i in converged_at if start <= i < chunk.stop]
        is_timed = timing and not is_first and chunk.stop - start == size
        texts = list(prompts[chunk])
        plain = _run(pipe, None, texts, seeds[chunk], call, measured[PLAIN], is_first, is_timed)
        sigmas = pipe.scheduler.sigmas.detach().cpu()
        _score(measured[PLAIN], plain, None, texts, scorer, wanted)
        for method, key in zip(methods, keys, strict=True):
            with method.using(pipe, sigmas):
                images = _run(pipe, method, texts, seeds[chunk], call, measured[key], is_first, is_timed)
            _score(measured[key], images, plain, texts, scorer, wanted)
        if report is not None:
            report(chunk.stop, {"evaluated_samples": float(chunk.stop)})
    missing = settings.wall_clock_repeats - len(measured[PLAIN].seconds) if timing else 0
    for _ in range(missing):
        _time_all(pipe, methods, keys, prompts[:size], seeds[:size], call, sigmas, measured)
    converged: torch.Tensor | None = None
    if converged_at:
        slow = dataclasses.replace(call, num_inference_steps=settings.converged_steps)
        texts, noise = [prompts[i] for i in converged_at], [seeds[i] for i in converged_at]
        converged = sample(pipe, texts, noise, slow, batch_size=size)
    groups = _groups(prompts)
    gathered = {key: _samples(found, converged, scorer is not None) for key, found in measured.items()}
    trace = measured[PLAIN].trace
    assert trace.shapes.call is not None, "the plain run calls the transformer"
    model = count_transformer(pipe.transformer, *trace.shapes.call)
    rows = [
        _row(
            method,
            measured[key],
            gathered[key],
            measured[PLAIN],
            groups,
            converged_at,
            model,
            sigmas,
            settings,
        )
        for method, key in zip(methods, keys, strict=True)
    ]
    return Results(
        rows=tuple(rows),
        groups=groups,
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        samples=gathered,
        converged_indices=tuple(converged_at),
        counts={
            "prompts": len(set(prompts)),
            "samples": len(prompts),
            "converged_samples": len(converged_at),
            "converged_steps": settings.converged_steps,
            "feature_samples": min(size, len(prompts)),
            "batch_size": size,
            "timed_calls": len(measured[PLAIN].seconds),
            "resamples": settings.bootstrap,
        },
        call=dataclasses.asdict(call),
        sigmas=tuple(sigmas.tolist()),
        boundaries=next((m.predictor.spec.boundaries for m in methods if m.predictor), ()),
        alphas=_alphas(methods, sigmas),
        pictures={key: found.first for key, found in measured.items() if found.first is not None},
        resamples=settings.bootstrap,
        about=dict(about or {}),
    )


def _run(
    pipe: Any,
    method: Method | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: CallParams,
    found: _Measured,
    is_first: bool,
    is_timed: bool,
) -> torch.Tensor:
    """Pictures of one batch; the method is on the pipeline already."""
    own = call if method is None else method.call(call)
    with probe(pipe, deep=is_first, held=method.held if method else None) as trace:
        images, seconds = timed_sample(pipe, prompts, seeds, own, len(prompts))
    found.calls += trace.calls
    found.computed += trace.computed
    if is_first:
        found.first, found.trace = images, trace
    if is_timed:
        found.seconds.append(seconds)
    return images


def _score(
    found: _Measured,
    images: torch.Tensor,
    plain: torch.Tensor | None,
    prompts: list[str],
    scorer: Scorer | None,
    converged: Sequence[int],
) -> None:
    if plain is not None:
        found.psnr.append(metrics.psnr(images, plain))
        found.ssim.append(metrics.ssim(images, plain))
    if scorer is not None:
        found.agreement.append(scorer.agreement(images, prompts).double())
    if converged:
        found.kept.append(images[list(converged)])


def _time_all(
    pipe: Any,
    methods: Sequence[Method],
    keys: Sequence[tuple[str, str]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: CallParams,
    sigmas: torch.Tensor,
    measured: Mapping[tuple[str, str], _Measured],
) -> None:
    """One more timed call of everything, where there were fewer batches than repeats."""
    measured[PLAIN].seconds.append(timed_sample(pipe, prompts, seeds, call, len(prompts))[1])
    for method, key in zip(methods, keys, strict=True):
        with method.using(pipe, sigmas):
            taken = timed_sample(pipe, prompts, seeds, method.call(call), len(prompts))[1]
        measured[key].seconds.append(taken)


def _samples(found: _Measured, converged: torch.Tensor | None, has_scorer: bool) -> Samples:
    result: Samples = {}
    if found.psnr:
        result["psnr"] = torch.cat(found.psnr).numpy()
        result["ssim"] = torch.cat(found.ssim).numpy()
    if has_scorer:
        result["agreement"] = torch.cat(found.agreement).numpy()
    if converged is not None:
        result["converged_psnr"] = metrics.psnr(torch.cat(found.kept), converged).numpy()
    return result


def _row(
    method: Method,
    found: _Measured,
    values: Samples,
    plain: _Measured,
    groups: np.ndarray,
    converged_at: Sequence[int],
    model: ModelFlops,
    sigmas: torch.Tensor,
    settings: EvaluateParams,
) -> Row:
    def estimated(metric: str) -> Estimate | None:
        if metric not in values:
            return None
        members = groups[list(converged_at)] if metric == "converged_psnr" else groups
        return estimate(values[metric], members, settings.bootstrap)

    psnr, ssim = estimated("psnr"), estimated("ssim")
    assert psnr is not None and ssim is not None
    num_steps = len(sigmas) - 1
    computed = found.computed / found.calls * method.num_steps
    errors = _feature_errors(found.trace, plain.trace, num_steps) if method.same_steps else None
    predicted = method.schedule.predicted_steps if method.schedule else range(num_steps)
    ratios = [a / b for a, b in zip(plain.seconds, found.seconds, strict=True)]
    return Row(
        budget=method.budget,
        method=method.name,
        label=method.label,
        kind=method.kind,
        num_steps=method.num_steps,
        computed_steps=computed,
        step_ratio=num_steps / computed,
        psnr=psnr,
        ssim=ssim,
        agreement=estimated("agreement"),
        converged_psnr=estimated("converged_psnr"),
        feature_error=None if errors is None else metrics.mean_or_nan([errors[step] for step in predicted]),
        feature_error_by_step=errors,
        wall_clock_ratio=statistics.median(ratios) if ratios else None,
        wall_clock_range=(min(ratios), max(ratios)) if ratios else None,
        flops_ratio=num_steps * model.total / method.flops(model, computed, sigmas),
        bytes_kept=found.trace.peak_bytes // len(found.first)
        if found.first is not None and method.kind != "solver"
        else None,
        weight_bytes=method.predictor.nbytes if method.predictor else 0,
        settings=method.settings,
        full_steps=method.schedule.full_steps if method.schedule else None,
    )


def _feature_errors(trace: RunTrace, plain: RunTrace, num_steps: int) -> tuple[float, ...]:
    """[S] relative L1 of the first batch, the mean over its samples and the step's branches."""
    pairs = zip(trace.features, plain.features, strict=True)
    by_call = torch.stack([metrics.relative_l1(ours, true).mean() for ours, true in pairs])
    return tuple(by_call.reshape(num_steps, -1).mean(dim=1).tolist())


def _alphas(methods: Sequence[Method], sigmas: torch.Tensor) -> dict[str, dict[str, list[float]]]:
    """How far along the projected history each predictor goes at predicted steps, beside first-order Taylor.

    Both multiply a difference of full-step features: Taylor's is newest minus the one before, which is also
    what the projection starts from. NaN at full steps.
    """
    curves: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        if method.predictor is None or method.schedule is None:
            continue
        schedule, at = method.schedule, curves.setdefault(method.budget, {})
        alphas = method.predictor.alphas(schedule, sigmas)
        at[method.name] = [
            float("nan") if schedule.is_full(step) else float(alphas[step])
            for step in range(schedule.num_steps)
        ]
        at["taylor1"] = [_taylor_alpha(schedule, step) for step in range(schedule.num_steps)]
    return curves


def _taylor_alpha(schedule: Schedule, step: int) -> float:
    anchors = schedule.anchors(step, 2)
    if schedule.is_full(step):
        return float("nan")
    return (step - anchors[0]) / (anchors[0] - anchors[1]) if len(anchors) == 2 else 0.0


def _converged_indices(num_samples: int, fraction: float) -> list[int]:
    """Samples spread evenly over all of them; at least two where any are wanted."""
    count = min(num_samples, max(2, round(fraction * num_samples))) if fraction > 0 else 0
    return [(2 * i + 1) * num_samples // (2 * count) for i in range(count)]


def _groups(prompts: Sequence[str]) -> np.ndarray:
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([numbers[prompt] for prompt in prompts], dtype=np.int64)


def _check(methods: Sequence[Method], prompts: Sequence[str], seeds: Sequence[int]) -> None:
    problems = []
    if not prompts:
        problems.append("prompts: at least one sample is needed")
    if len(prompts) != len(seeds):
        problems.append(f"{len(prompts)} prompts and {len(seeds)} seeds: every sample needs one of each")
    if len(set(seeds)) != len(seeds):
        problems.append("seeds: one is there twice; samples would not be independent")
    names = [(method.budget, method.name) for method in methods]
    doubles = sorted({f"{name} at {budget}" for budget, name in names if names.count((budget, name)) > 1})
    if doubles:
        problems.append(f"methods: {', '.join(doubles)} is there twice")
    if problems:
        raise ValueError("evaluation: " + "; ".join(problems))
