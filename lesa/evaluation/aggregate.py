"""Results out of what was measured: rows with their intervals, and the curves of the report."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lesa import metrics
from lesa.evaluation.bootstrap import share_interval
from lesa.evaluation.measure import BY_BATCH, PLAIN, Measured, MeasuredPart, converged_indices
from lesa.evaluation.results import Estimate, Results, Row, Samples, estimate
from lesa.models.flops import ModelFlops
from lesa.params import CallParams, EvaluateParams
from lesa.peers.method import Method
from lesa.schedule import Schedule


def join(parts: Sequence[MeasuredPart]) -> MeasuredPart:
    """All parts as one; they come in the order of their samples."""
    first, *later = parts
    joined = {key: copy(measured) for key, measured in first.by_method.items()}
    for measured in joined.values():
        for name in BY_BATCH:
            setattr(measured, name, list(getattr(measured, name)))
    for part in later:
        for key, measured in part.by_method.items():
            joined[key].extend(measured)
    return replace(first, by_method=joined)


def gather(
    parts: Sequence[MeasuredPart],
    methods: Sequence[Method],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    call: CallParams,
    settings: EvaluateParams,
    about: Mapping[str, Any] | None = None,
) -> Results:
    """The results of a measurement.

    Args:
        parts: what each process measured, in the order of their samples.
        methods, prompts, seeds, call, settings, about: as `lesa.evaluation.compare.evaluate_methods` takes them.
    """
    joined = join(parts)
    by_method, sigmas, model = joined.by_method, joined.sigmas, joined.model
    assert model is not None, "one part has the first batch"
    groups = _groups(prompts)
    converged_at = converged_indices(len(prompts), settings.converged_fraction)
    sampled = {key: _samples(measured) for key, measured in by_method.items()}
    rows = []
    for method in methods:
        key = (method.budget, method.name)
        plain, measured, values = by_method[PLAIN], by_method[key], sampled[key]
        rows.append(_row(method, measured, values, plain, groups, converged_at, model, sigmas, settings))
    return Results(
        rows=tuple(rows),
        groups=groups,
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        samples=sampled,
        converged_indices=tuple(converged_at),
        counts={
            "prompts": len(set(prompts)),
            "samples": len(prompts),
            "converged_samples": len(converged_at),
            "converged_steps": settings.converged_steps,
            "feature_samples": min(settings.batch_size, len(prompts)),
            "batch_size": settings.batch_size,
            "timed_calls": len(by_method[PLAIN].seconds),
            "processes": len(parts),
            "threads": joined.threads,
            "resamples": settings.bootstrap,
        },
        call=dataclasses.asdict(call),
        sigmas=tuple(sigmas.tolist()),
        boundaries=next((m.predictor.spec.boundaries for m in methods if m.predictor), ()),
        alphas=_alphas(methods, sigmas),
        images={key: measured.images for key, measured in by_method.items() if measured.images is not None},
        resamples=settings.bootstrap,
        about=dict(about or {}),
    )


def _samples(measured: Measured) -> Samples:
    named = {
        "psnr": measured.psnr,
        "ssim": measured.ssim,
        "agreement": measured.agreement,
        "converged_psnr": measured.converged,
    }
    return {name: torch.cat(values).numpy() for name, values in named.items() if values}


def _row(
    method: Method,
    measured: Measured,
    values: Samples,
    plain: Measured,
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
    assert psnr is not None and ssim is not None and measured.images is not None
    num_steps = len(sigmas) - 1
    computed = measured.computed / measured.calls * method.num_steps
    errors = measured.feature_errors
    predicted = method.schedule.predicted_steps if method.schedule else range(num_steps)
    ratios = [a / b for a, b in zip(plain.seconds, measured.seconds, strict=True)]
    return Row(
        budget=method.budget,
        method=method.name,
        label=method.label,
        kind=method.kind,
        num_steps=method.num_steps,
        computed_steps=computed,
        step_ratio=num_steps / computed,
        psnr=psnr,
        outliers=share_interval(values["psnr"] < metrics.OUTLIER_DB, groups, settings.bootstrap),
        ssim=ssim,
        agreement=estimated("agreement"),
        converged_psnr=estimated("converged_psnr"),
        feature_error=None if errors is None else metrics.mean_or_nan([errors[step] for step in predicted]),
        feature_error_by_step=errors,
        wall_clock_ratio=statistics.median(ratios) if ratios else None,
        wall_clock_range=(min(ratios), max(ratios)) if ratios else None,
        flops_ratio=num_steps * model.total / method.flops(model, computed, sigmas),
        bytes_kept=None if method.kind == "solver" else measured.peak_bytes // len(measured.images),
        weight_bytes=method.predictor.nbytes if method.predictor else 0,
        settings=method.settings,
        full_steps=method.schedule.full_steps if method.schedule else None,
    )


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
            float("nan") if schedule.is_full(step) else float(alphas[step]) for step in range(schedule.num_steps)
        ]
        at["taylor1"] = [_taylor_alpha(schedule, step) for step in range(schedule.num_steps)]
    return curves


def _taylor_alpha(schedule: Schedule, step: int) -> float:
    anchors = schedule.anchors(step, 2)
    if schedule.is_full(step):
        return float("nan")
    return (step - anchors[0]) / (anchors[0] - anchors[1]) if len(anchors) == 2 else 0.0


def _groups(prompts: Sequence[str]) -> np.ndarray:
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([numbers[prompt] for prompt in prompts], dtype=np.int64)
