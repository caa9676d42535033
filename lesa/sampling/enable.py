"""enable, disable, summary: a bundle on a pipeline, and off again without a trace."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from lesa.bundle import Bundle
from lesa.bundle.budgets import choose_schedule
from lesa.errors import LesaError
from lesa.models.families import family_of
from lesa.models.fingerprint import WeightSample, adapters, is_quantized
from lesa.pull import bundle_from
from lesa.sampling.adaptive import Fallback, adaptive_problems, fallback_of
from lesa.sampling.binding import LazyPredictor, StepCountBinding
from lesa.sampling.checks import (
    CheckResult,
    FirstCall,
    MismatchError,
    altered_problems,
    call_problems,
    fingerprint_problems,
    pipeline_problems,
    scheduler_problems,
    weights_problems,
)
from lesa.sampling.hook import (
    WHOLE,
    LesaCacheConfig,
    apply_lesa_cache,
    cache_state,
    is_lesa_cache_enabled,
    remove_lesa_cache,
)
from lesa.sampling.statistics import RunStatistics
from lesa.schedule import Schedule

_NOT_ENABLED = "LESA is not enabled on this pipeline: call lesa.enable(pipe, bundle) first"
ALLOWANCES = ("lora", "quantized", "pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Enabled:
    """A bundle on a pipeline, with one of its schedules."""

    owner: weakref.ref[Any]  # the pipeline: hooks must not keep it alive
    bundle: Bundle
    schedule: Schedule
    chosen: str  # name of the schedule: a budget's, or for people
    fallback: Fallback | None
    allow: Collection[str]
    weights: WeightSample  # when LESA was enabled
    is_measured: bool  # whether those were the ones that the bundle was measured with

    def check(self, call: FirstCall) -> CheckResult:
        """What does not fit in the first call of a run, and the run's facts."""
        manifest, quantized = self.bundle.manifest, is_quantized(call.transformer)
        # Rounded weights differ from those before, whatever else was done to them.
        altered = [] if quantized else self.weights.differences(WeightSample.of(call.transformer))
        problems = [
            *(adaptive_problems(call.scheduler, self.schedule) if self.fallback is not None else ()),
            *scheduler_problems(call.scheduler, manifest),
            *weights_problems(call.transformer, self.allow, quantized=quantized),
            *altered_problems(altered, call.transformer, self.allow),
            *call_problems(self.owner(), manifest.call, call),
        ]
        return CheckResult(problems=problems, notes=self.notes(call.transformer, bool(altered), quantized))

    def notes(self, transformer: torch.nn.Module, altered: bool, quantized: bool) -> dict[str, str]:
        """Facts for the summary as they are now: adapters come and go between the runs."""
        name, manifest = type(self.owner()).__name__, self.bundle.manifest
        notes = {"bundle": f"{manifest.workload} ({self.bundle.digest[:12]})", "budget": self.chosen}
        mismatches = [] if name == manifest.pipeline_class else [name]
        if names := adapters(transformer):
            mismatches.append(f"adapters {', '.join(names)}")
        if altered or not (quantized or self.is_measured):
            mismatches.append("weights that are not the bundle's, taken for those of a fused LoRA")
        if mismatches:
            notes["not measured with"] = ", ".join(mismatches)
        if quantized:
            notes["weights"] = "quantised; the fingerprint was not compared"
        if self.fallback is not None:
            notes["adaptive"] = self.fallback.promise
        return notes


_ENABLED: weakref.WeakKeyDictionary[torch.nn.Module, _Enabled] = weakref.WeakKeyDictionary()


def enable(
    pipe: Any,
    bundle: Bundle | str | Path,  # a bundle, its folder, or "models:/name@alias" of a registry
    *,
    interval: int | None = None,  # steps from one full step to the next; 1 is plain sampling
    full_steps: Sequence[int] | None = None,  # the full steps themselves
    budget: str | None = None,  # a schedule of the bundle by name; nothing asked for: its default budget
    min_psnr: float | None = None,  # dB to the plain run: the fastest budget that measured at least so much
    max_loss_db: float | None = None,  # the fastest budget that measured at most so much below the bundle's best
    max_outlier_share: float | None = None,  # the fastest known to give another picture in at most so many of its runs
    # "lora" (loaded or fused), "quantized", "pipeline": accept what the bundle was not measured with.
    allow: Collection[str] = (),
    measure: bool = True,  # at full steps, measure what the predictor would have been off by
    adaptive: bool = False,  # go on with a slower budget where that error exceeds the bound it was calibrated to
) -> None:
    """Accelerate a diffusers pipeline with a bundle made for its model.

    A bundle made with text-to-image serves the pipelines that run the same weights on the same tokens from
    images (`Family.related_pipelines`) where `allow` has "pipeline". A run that begins in the middle of the
    schedule keeps the schedule's full steps and is full until the predictor has the history it was made for.
    With `adaptive`, a run whose errors stay within their bounds is the same as without. One that leaves them, as with
    an adapter that changes much, goes on with the bundle's next slower budget. The worst sample of a batch decides for
    all. Features of that budget's history are kept beside those of the budget in use: up to twice the memory.
    It is the transformer that is accelerated: another pipeline that shares it and the scheduler is too, where its
    calls cannot be told from those of `pipe` (image to image or inpainting at strength 1).

    Weights, blocks, hooks, offloading, parallelism, scheduler and call are checked again at the first transformer call
    of every run, before anything is computed: what is not as it was is refused, or shown in `summary` where `allow`
    accepts it. A run may have any number of steps in the bundle's `step_range`: a budget is carried to it, with as many
    full steps as the bundle's fastest budget at least. A run of fewer, as servers make it to warm up, is full.

    Raises:
        MismatchError: the pipeline is not what the bundle was made for; every difference is listed, and the
            pipeline is as it was.
        BundleError: the bundle is broken.
        ValueError: a schedule that the predictor cannot serve, an argument out of range, or `adaptive` with what has
            no bounds (a schedule that is no budget, an older bundle) or no slower budget.
    """
    transformer = _free_transformer(pipe, allow)
    loaded = bundle if isinstance(bundle, Bundle) else bundle_from(bundle)
    manifest = loaded.manifest
    quantized = is_quantized(transformer)
    unknown = fingerprint_problems(transformer, manifest, quantized=quantized)
    problems = pipeline_problems(pipe, transformer, manifest, allow, quantized=quantized)
    problems += unknown if "lora" not in allow else []
    if problems:
        raise MismatchError(f"bundle {manifest.workload} does not fit this pipeline", problems)
    choose = partial(
        choose_schedule,
        manifest,
        interval=interval,
        full_steps=full_steps,
        budget=budget,
        min_psnr=min_psnr,
        max_loss_db=max_loss_db,
        max_outlier_share=max_outlier_share,
    )
    schedule, chosen = choose()
    if adaptive and not measure:
        raise LesaError("adaptive: needs measure=True, since the measured errors decide")
    enabled = _Enabled(
        owner=weakref.ref(pipe),
        bundle=loaded,
        schedule=schedule,
        chosen=chosen,
        fallback=fallback_of(loaded, chosen) if adaptive else None,
        allow=allow,
        weights=WeightSample.of(transformer) if not quantized else WeightSample.none(),
        is_measured=not unknown,
    )
    sigmas, predictor = torch.tensor(manifest.sigmas), loaded.predictor
    others = StepCountBinding(predictor, manifest.sigmas, lambda n: choose(num_steps=n)[0], LazyPredictor)
    config = LesaCacheConfig(
        schedule=schedule,
        rule=LazyPredictor(predictor, schedule, sigmas),
        scheduler=lambda: getattr(enabled.owner(), "scheduler", None),
        sigmas=manifest.sigmas,
        other_steps=others if predictor.spec.step_counts and not adaptive else None,
        fallback=enabled.fallback,
        least_steps=predictor.spec.step_range[0],
        check=enabled.check,
        num_branches=len(manifest.branches),
        late_start=type(pipe).__name__ not in family_of(transformer).pipeline_classes,
        measure=measure,
        notes=enabled.notes(transformer, altered=False, quantized=quantized),
        bounds=manifest.budgets[chosen].bounds if chosen in manifest.budgets else {},
    )
    apply_lesa_cache(transformer, config)
    _ENABLED[transformer] = enabled


def disable(pipe: Any) -> None:
    """Take LESA off a pipeline: it samples as before, bit for bit. Harmless where LESA is not enabled."""
    transformer = _transformer(pipe)
    remove_lesa_cache(transformer)
    _ENABLED.pop(transformer, None)


def summary(pipe: Any) -> RunStatistics:
    """The newest run: `print` it for a table a step, `.to_dict()` for plain values; no steps where it was refused.

    Raises:
        LesaError: LESA is not enabled on the pipeline, or its hooks were silenced and it has not seen the newest run.
    """
    transformer = _transformer(pipe)
    if not is_lesa_cache_enabled(transformer):
        raise LesaError(_NOT_ENABLED)
    return cache_state(transformer)


def call_kwargs(pipe: Any) -> dict[str, Any]:
    """The call the enabled bundle was made for: size, steps, guidance, text length, for the pipeline."""
    enabled = _ENABLED.get(_transformer(pipe))
    if enabled is None:
        raise LesaError(_NOT_ENABLED)
    accepted = inspect.signature(type(pipe).__call__).parameters
    call = dataclasses.asdict(enabled.bundle.manifest.call)
    given = {name: value for name, value in call.items() if value is not None and name in accepted}
    if given.get("true_cfg_scale", 0.0) > 1.0:
        given["negative_prompt"] = " "  # without one the pipelines leave out the unconditional branch
    return given


def _free_transformer(pipe: Any, allow: Collection[str]) -> torch.nn.Module:
    """The pipeline's transformer, with no cache enabled on it; `LesaError` also for what cannot be allowed."""
    unknown = sorted(set(allow) - set(ALLOWANCES))
    if unknown or isinstance(allow, str):
        got = allow if isinstance(allow, str) else ", ".join(unknown)
        raise LesaError(f"allow: a collection of {', '.join(ALLOWANCES)}; got {got!r}")
    transformer = _transformer(pipe)
    if is_lesa_cache_enabled(transformer):
        raise LesaError("LESA is enabled on this pipeline already: call lesa.disable(pipe) first")
    if getattr(transformer, "is_cache_enabled", False):
        raise LesaError("another cache is enabled: call pipe.transformer.disable_cache() first")
    family_of(transformer)
    if getattr(getattr(pipe.transformer, "dynamo_ctx", None), "fullgraph", False):
        raise LesaError(WHOLE)
    return transformer


def _transformer(pipe: Any) -> torch.nn.Module:
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, torch.nn.Module):
        raise LesaError(f"{type(pipe).__name__} has no transformer: LESA accelerates diffusion transformers")
    return unwrap_module(transformer)
