"""diffusers' own threshold caches as peers, FirstBlockCache and MagCache, and the settings they run at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig

from lesa.models.families import blocks, family_of
from lesa.models.pipelines import sample
from lesa.params import CallParams, Report
from lesa.peers.method import Method
from lesa.peers.tuning import EVERYTHING, Bench, CacheSearch, Cost, Trial, best_trial, bisect_threshold, tune_caches


def diffusers_cache_method(
    budget: str,
    num_steps: int,
    config: Callable[[], Any],
    *,
    name: str,
    label: str,
    leading_blocks: int = 0,
    settings: Mapping[str, Any],
) -> Method:
    """One of diffusers' own caches; `config` makes a fresh configuration each time it is put on."""
    return Method(
        name=name,
        label=label,
        budget=budget,
        kind="cache",
        using=lambda pipe, sigmas: _diffusers_cache(pipe, config),
        num_steps=num_steps,
        leading_blocks=leading_blocks,
        settings=settings,
    )


def first_block_method(budget: str, num_steps: int, threshold: float) -> Method:
    """diffusers' FirstBlockCache: the first block runs at every step and tells whether the others must."""
    return diffusers_cache_method(
        budget,
        num_steps,
        lambda: FirstBlockCacheConfig(threshold=threshold),
        name="first_block_cache",
        label="FirstBlockCache",
        leading_blocks=1,
        settings={"threshold": threshold},
    )


def mag_cache_method(
    budget: str,
    num_steps: int,
    ratios: Sequence[float],
    *,
    threshold: float,
    retention_steps: int,
    max_skip_steps: int,
) -> Method:
    """diffusers' MagCache with magnitude ratios calibrated on this model."""

    def config() -> MagCacheConfig:
        return MagCacheConfig(
            threshold=threshold,
            max_skip_steps=max_skip_steps,
            retention_ratio=retention_steps / num_steps,
            num_inference_steps=num_steps,
            mag_ratios=list(ratios),
        )

    return diffusers_cache_method(
        budget,
        num_steps,
        config,
        name="mag_cache",
        label="MagCache",
        settings={
            "threshold": threshold,
            "retention_steps": retention_steps,
            "max_skip_steps": max_skip_steps,
        },
    )


@contextmanager
def _diffusers_cache(pipe: Any, config: Callable[[], Any]) -> Iterator[None]:
    pipe.transformer.enable_cache(config())
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


CACHES = ("first_block_cache", "mag_cache")
FIRST_BLOCK_TRIALS = 8  # bisection steps for one target
_THRESHOLDS = (1e-4, 4.0)  # of FirstBlockCache: relative changes of a residual
_MAG_THRESHOLDS = np.geomspace(1e-4, 1e3, 400)
_MAG_CANDIDATES = 6  # schedules of MagCache that are run for one target


def tuned_caches(
    pipe: Any,
    ours: Mapping[str, Method],
    *,
    call: CallParams,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    repeats: int = 3,
    caches: Sequence[str] = CACHES,
    cost: Cost = "seconds",
    report: Report | None = None,
) -> list[Method]:
    """FirstBlockCache and MagCache, tuned for every budget.

    Args:
        pipe: the pipeline.
        ours: the predictor's method at each budget, whose time is the measure.
        call: the plain run.
        prompts: training prompts, one a sample; never those that are judged.
        seeds: noise of each.
        batch_size: samples a pipeline call.
        repeats: timed runs of each kind; their median counts.
        caches: those of `CACHES` that are wanted.
        cost: as `lesa.peers.tuning.tune_caches` takes it.
        report: called after each search.

    Returns:
        the same names at every budget; `settings` says what the tuning saw.
    """
    with torch.no_grad():
        ratios, reference = magnitude_ratios(pipe, prompts, seeds, call, batch_size)
        bench = Bench(
            pipe=pipe,
            prompts=prompts,
            seeds=seeds,
            call=call,
            batch_size=batch_size,
            sigmas=pipe.scheduler.sigmas.detach().cpu(),
            reference=reference,
        )
        num_steps = call.num_inference_steps
        eager = mag_cache_method(
            "", num_steps, ratios, threshold=EVERYTHING, retention_steps=0, max_skip_steps=num_steps
        )
        searches = [
            CacheSearch(
                name="first_block_cache",
                eager=first_block_method("", num_steps, EVERYTHING),
                search=_search_first_block,
            ),
            CacheSearch(name="mag_cache", eager=eager, search=partial(_search_mag_cache, ratios)),
        ]
        wanted = [each for each in searches if each.name in caches]
        return tune_caches(bench, ours, wanted, repeats=repeats, cost=cost, report=report)


def magnitude_ratios(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: CallParams,
    batch_size: int,
) -> tuple[list[float], torch.Tensor]:
    """MagCache's calibration on several samples, and the images of the plain run that it is measured on.

    The ratio of a step is the mean over samples, branches and tokens of the residual's norm (last block's
    image tokens minus the first block's input) over that of the step before; 1 at the first step.
    """
    transformer = pipe.transformer
    rows = blocks(transformer, family_of(transformer))
    head, (_, tail, row) = rows[0][1], rows[-1]
    entered: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []  # [B, L] of every call

    def on_head(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]

    def on_tail(module: torch.nn.Module, args: Any, output: Any) -> None:
        hidden = output if row.encoder_index is None else output[row.hidden_index]
        norms.append(torch.linalg.vector_norm(hidden.float() - entered[0].float(), dim=-1).cpu())

    handles = [
        head.register_forward_pre_hook(on_head, with_kwargs=True),
        tail.register_forward_hook(on_tail),
    ]
    try:
        images, steps = [], call.num_inference_steps
        totals, count = torch.zeros(steps, dtype=torch.float64), 0
        for start in range(0, len(prompts), batch_size):
            norms.clear()
            chunk = slice(start, start + batch_size)
            images.append(sample(pipe, prompts[chunk], seeds[chunk], call, batch_size=batch_size))
            by_step = torch.stack(norms).reshape(steps, -1, *norms[0].shape)  # [S, branches, B, L]
            ratio = by_step[1:] / by_step[:-1].clamp_min(1e-8)
            totals[0] += len(images[-1])
            totals[1:] += ratio.double().mean(dim=(1, 3)).sum(dim=1)
            count += len(images[-1])
    finally:
        for handle in handles:
            handle.remove()
    return (totals / count).tolist(), torch.cat(images)


def mag_cache_steps(
    ratios: Sequence[float], threshold: float, retention_steps: int, max_skip_steps: int
) -> tuple[int, ...]:
    """The steps that MagCache computes with these settings: its decision needs no model."""
    return _mag_cache_steps(tuple(ratios), threshold, retention_steps, max_skip_steps)


@lru_cache(maxsize=1 << 15)  # the search of every target asks for the same ones
def _mag_cache_steps(
    ratios: tuple[float, ...], threshold: float, retention_steps: int, max_skip_steps: int
) -> tuple[int, ...]:
    computed: list[int] = []
    ratio, error, skipped = np.float32(1.0), np.float32(0.0), 0
    for step, scale in enumerate(ratios):
        skip = False
        if step >= retention_steps:
            ratio = np.float32(ratio * np.float32(scale))
            skipped += 1
            error = np.float32(error + abs(np.float32(1.0) - ratio))
            skip = bool(computed and error <= threshold and skipped <= max_skip_steps)
            if not skip:
                ratio, error, skipped = np.float32(1.0), np.float32(0.0), 0
        if not skip:
            computed.append(step)
    return tuple(computed)


def _search_first_block(bench: Bench, target: float, trials: list[Trial]) -> Trial:
    """Bisection of the threshold."""
    trials += bisect_threshold(
        bench,
        lambda threshold: first_block_method("", len(bench.sigmas) - 1, threshold),
        target,
        trials,
        between=_THRESHOLDS,
        tries=FIRST_BLOCK_TRIALS,
    )
    return best_trial(trials, target)


def _search_mag_cache(ratios: Sequence[float], bench: Bench, target: float, trials: list[Trial]) -> Trial:
    """Thresholds, retained first steps and longest skips with the fewest computed steps at or above the
    target."""
    num_steps = len(ratios)
    by_steps: dict[tuple[int, ...], tuple[float, int, int]] = {}
    even_skip = max(1, math.ceil(num_steps / max(target, 1.0)))
    for retention in sorted({1, 2, 3, round(0.1 * num_steps), round(0.2 * num_steps)}):
        for max_skip in sorted({even_skip - 1, even_skip, even_skip + 2, num_steps} - {0}):
            options = [
                (len(steps), float(threshold), steps)
                for threshold in _MAG_THRESHOLDS
                if len(steps := mag_cache_steps(ratios, threshold, retention, max_skip)) >= target
            ]
            if options:
                _, threshold, steps = min(options)
                by_steps.setdefault(steps, (threshold, retention, max_skip))
    nearest = sorted(by_steps, key=lambda steps: (len(steps), _longest_gap(steps, num_steps)))
    tried = {tuple(trial.method.settings.values()) for trial in trials}
    for steps in nearest[:_MAG_CANDIDATES]:
        threshold, retention, max_skip = by_steps[steps]
        if (threshold, retention, max_skip) in tried:
            continue  # for another target
        method = mag_cache_method(
            "",
            num_steps,
            ratios,
            threshold=threshold,
            retention_steps=retention,
            max_skip_steps=max_skip,
        )
        trials.append(bench.trial(method))
    return best_trial(trials, target)


def _longest_gap(steps: Iterable[int], num_steps: int) -> int:
    return max(later - step for step, later in pairwise([*steps, num_steps]))
