"""Threshold caches at their best: tuned on training prompts until they are no faster than the predictor.

A cache is given the time of the predictor's run: from the plain run, the predictor's and a run in which the
cache skips all it can, follows how many computed steps that time buys. Where that is fewer than the
predictor's full steps (FirstBlockCache pays for a block at every step, which is much of a small model), the
cache gets as many full steps as the predictor all the same and is slower; the setting at equal time is then
a row of its own.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from lesa import metrics
from lesa.families import blocks, family_of
from lesa.methods import Method, first_block_method, mag_cache_method
from lesa.params import CallParams
from lesa.pipelines import sample
from lesa.probe import probe
from lesa.timing import timed_sample

Report = Callable[[int, dict[str, float]], None]

FIRST_BLOCK_TRIALS = 8  # bisection steps for one target
_LOWEST, _HIGHEST = 1e-4, 4.0  # thresholds of FirstBlockCache: relative changes of a residual
_EVERYTHING = 1e9  # a threshold that skips all a cache can skip
_MAG_THRESHOLDS = np.geomspace(1e-4, 1e3, 400)
_MAG_CANDIDATES = 6  # schedules of MagCache that are run for one target


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One setting of a cache, run on the tuning samples."""

    method: Method
    computed: float  # mean number of computed steps
    psnr: float  # mean, dB, to the plain run


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What trials are run on."""

    pipe: Any
    prompts: Sequence[str]
    seeds: Sequence[int]
    call: CallParams
    batch_size: int
    sigmas: torch.Tensor  # [S + 1]
    reference: torch.Tensor  # pictures of the plain run

    @classmethod
    def of(
        cls, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], call: CallParams, batch_size: int
    ) -> Bench:
        """With the plain run's pictures and noise levels."""
        reference = sample(pipe, prompts, seeds, call, batch_size=batch_size)
        return cls(
            pipe=pipe,
            prompts=prompts,
            seeds=seeds,
            call=call,
            batch_size=batch_size,
            sigmas=pipe.scheduler.sigmas.detach().cpu(),
            reference=reference,
        )

    def trial(self, method: Method) -> Trial:
        with method.using(self.pipe, self.sigmas), probe(self.pipe) as trace:
            images = self.sample(method.call(self.call))
        computed = trace.computed_share * method.num_steps
        return Trial(
            method=method,
            computed=computed,
            psnr=float(metrics.psnr(images, self.reference).mean()),
        )

    def sample(self, call: CallParams) -> torch.Tensor:
        return sample(self.pipe, self.prompts, self.seeds, call, batch_size=self.batch_size)


def tuned_caches(
    pipe: Any,
    ours: Mapping[str, Method],
    *,
    call: CallParams,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    repeats: int = 3,
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
        report: called after each trial.

    Returns:
        the same names at every budget; `settings` says what the tuning saw.
    """
    with torch.no_grad():
        ratios, reference = magnitude_ratios(pipe, prompts, seeds, call, batch_size)
        sigmas = pipe.scheduler.sigmas.detach().cpu()
        bench = Bench(
            pipe=pipe,
            prompts=prompts,
            seeds=seeds,
            call=call,
            batch_size=batch_size,
            sigmas=sigmas,
            reference=reference,
        )
        num_steps = call.num_inference_steps
        eager = {
            "first_block_cache": first_block_method("", num_steps, _EVERYTHING),
            "mag_cache": mag_cache_method(
                "", num_steps, ratios, threshold=_EVERYTHING, retention_steps=0, max_skip_steps=num_steps
            ),
        }
        seconds = _seconds(bench, {**ours, **eager}, repeats)
        trials: dict[str, list[Trial]] = {name: [bench.trial(method)] for name, method in eager.items()}
        chosen: list[Method] = []
        full = {budget: float(method.schedule.num_full) for budget, method in ours.items() if method.schedule}
        for cache, search in (("first_block_cache", _search_first_block), ("mag_cache", _search_mag_cache)):
            equal_time = {
                budget: _affordable(seconds[budget], seconds[cache], seconds[""], num_steps, trials[cache][0])
                for budget in ours
            }
            found: dict[str, dict[str, Method]] = {}
            for name, suffix, targets in (
                (cache, "", {budget: max(equal_time[budget], full[budget]) for budget in ours}),
                (f"{cache}_equal_time", ", equal time", equal_time),
            ):
                found[name] = {}
                for budget, target in sorted(targets.items(), key=lambda item: item[1]):
                    best = search(bench, ratios, target, trials[cache])
                    found[name][budget] = _named(best, name, suffix, budget, target)
                    if report is not None:
                        done = len(chosen) + sum(map(len, found.values()))
                        report(done, {f"{name}_computed": best.computed, f"{name}_psnr": best.psnr})
            first, second = found.values()
            chosen += first.values()
            if any(_knobs(second[budget]) != _knobs(first[budget]) for budget in ours):
                chosen += second.values()
    return chosen


def magnitude_ratios(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: CallParams,
    batch_size: int,
) -> tuple[list[float], torch.Tensor]:
    """MagCache's calibration on several samples, with the pictures of the plain run that it is.

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


def _search_first_block(bench: Bench, ratios: Sequence[float], target: float, trials: list[Trial]) -> Trial:
    """Bisection of the threshold; `trials` grows and serves the next target too."""
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for known in trials:
        threshold = float(known.method.settings["threshold"])
        if known.computed >= target:
            low = max(low, math.log(threshold))
        else:
            high = min(high, math.log(threshold))
    for _ in range(FIRST_BLOCK_TRIALS):
        if low >= high - 1e-3 or any(abs(known.computed - target) < 0.5 for known in trials):
            break
        middle = (low + high) / 2
        known = bench.trial(first_block_method("", len(bench.sigmas) - 1, math.exp(middle)))
        trials.append(known)
        if known.computed >= target:
            low = middle
        else:
            high = middle
    return best_trial(trials, target)


def _search_mag_cache(bench: Bench, ratios: Sequence[float], target: float, trials: list[Trial]) -> Trial:
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
    for steps in nearest[:_MAG_CANDIDATES]:
        threshold, retention, max_skip = by_steps[steps]
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


def best_trial(trials: Sequence[Trial], target: float) -> Trial:
    """The best picture among all settings no slower than the first one that reaches the target.

    Settings that are faster still are not shut out: a peer must not lose by being given more time.
    """
    slow_enough = [trial.computed for trial in trials if trial.computed >= target - 1e-9]
    limit = min(slow_enough) if slow_enough else max(trial.computed for trial in trials)
    return max((t for t in trials if t.computed <= limit + 1e-9), key=lambda trial: trial.psnr)


def _named(best: Trial, name: str, suffix: str, budget: str, target: float) -> Method:
    settings = {
        **best.method.settings,
        "target_computed_steps": round(target, 2),
        "tuning_computed_steps": round(best.computed, 2),
        "tuning_psnr": round(best.psnr, 3),
    }
    label = best.method.label + suffix
    return dataclasses.replace(best.method, name=name, label=label, budget=budget, settings=settings)


def _knobs(method: Method) -> list[Any]:
    """The settings of the cache itself, without what the tuning noted."""
    return [method.settings.get(name) for name in ("threshold", "retention_steps", "max_skip_steps")]


def _affordable(ours: float, eager: float, plain: float, num_steps: int, eager_trial: Trial) -> float:
    """Computed steps that take as long as our run, by linear interpolation between the two extremes."""
    fewest = eager_trial.computed
    if plain <= eager:
        return fewest
    steps = fewest + (ours - eager) * (num_steps - fewest) / (plain - eager)
    return min(max(steps, fewest), float(num_steps))


def _seconds(bench: Bench, methods: Mapping[str, Method], repeats: int) -> dict[str, float]:
    """Median seconds of each method's run; "" is the plain run. All take turns."""
    taken: dict[str, list[float]] = {name: [] for name in ("", *methods)}
    arguments = (bench.prompts, bench.seeds)
    for _ in range(repeats):
        taken[""].append(timed_sample(bench.pipe, *arguments, bench.call, bench.batch_size)[1])
        for name, method in methods.items():
            with method.using(bench.pipe, bench.sigmas):
                call = method.call(bench.call)
                taken[name].append(timed_sample(bench.pipe, *arguments, call, bench.batch_size)[1])
    return {name: statistics.median(values) for name, values in taken.items()}


def _longest_gap(steps: Iterable[int], num_steps: int) -> int:
    return max(later - step for step, later in pairwise([*steps, num_steps]))
