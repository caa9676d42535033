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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lesa import metrics
from lesa.models.flops import count_transformer
from lesa.models.pipelines import sample, timed_sample
from lesa.models.probe import probe
from lesa.params import CallParams, Report
from lesa.peers.method import Method

TUNING_SAMPLES = 16  # training prompts that peers with a threshold are tuned on, a sample each

Cost = Literal["seconds", "operations"]
EVERYTHING = 1e9  # a threshold that skips all a cache can skip


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
    reference: torch.Tensor  # images of the plain run

    @classmethod
    def of(
        cls, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], call: CallParams, batch_size: int
    ) -> Bench:
        """With the plain run's images and noise levels."""
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


@dataclass(frozen=True, kw_only=True)
class CacheSearch:
    """How the settings of a cache are found that share one cost of a skipped step.

    A cache with several such costs (more or fewer blocks that run at every step) is several searches of one name.
    """

    name: str  # key of the row
    eager: Method  # skips all it can, which tells what a skipped step costs
    # The best setting at a number of computed steps; the trials grow and serve the next number too.
    search: Callable[[Bench, float, list[Trial]], Trial]


def tune_caches(
    bench: Bench,
    ours: Mapping[str, Method],
    searches: Sequence[CacheSearch],
    *,
    repeats: int = 3,
    cost: Cost = "seconds",
    report: Report | None = None,
) -> list[Method]:
    """Every cache at its best setting for every budget; where equal time alone would mean another one, that too.

    Args:
        bench: training prompts; never those that are judged.
        ours: the predictor's method at each budget, whose time is the measure.
        searches: what is tuned; of several with one name the best image counts.
        repeats: timed runs of each kind; their median counts.
        cost: what time is measured by. "operations" gives the same settings on a busy machine and on every machine.
        report: called after each search.

    Returns:
        the same names at every budget; `settings` says what the tuning saw.
    """
    trials = [[bench.trial(each.eager)] for each in searches]
    if cost == "seconds":
        costs = _seconds(bench, [*ours.values(), *(each.eager for each in searches)], repeats)
    else:
        costs = _operations(bench, list(ours.values()), [eager for (eager,) in trials])
    plain, of_ours, of_eager = costs[0], costs[1 : 1 + len(ours)], costs[1 + len(ours) :]
    chosen: list[Method] = []
    done = 0
    for cache in dict.fromkeys(each.name for each in searches):
        usual: dict[str, _Best] = {}
        equal_time: dict[str, _Best] = {}
        for index, each in enumerate(searches):
            if each.name != cache:
                continue
            affordable = {
                # In a run of few steps the time saved may pay for all but a part of one: a cache that skips none is
                # the plain run.
                budget: min(
                    _affordable(time, of_eager[index], plain, method.num_steps, trials[index][0]),
                    method.num_steps - 1.0,
                )
                for (budget, method), time in zip(ours.items(), of_ours, strict=True)
            }
            as_many = {budget: max(steps, _num_full(ours[budget])) for budget, steps in affordable.items()}
            for best, targets in ((usual, as_many), (equal_time, affordable)):
                for budget, target in sorted(targets.items(), key=lambda item: item[1]):
                    trial = each.search(bench, target, trials[index])
                    if budget not in best or trial.psnr > best[budget].trial.psnr:
                        best[budget] = _Best(trial=trial, target=target)
                    done += 1
                    if report is not None:
                        report(done, {f"{cache}_computed": trial.computed, f"{cache}_psnr": trial.psnr})
        chosen += [usual[budget].method(cache, "", budget) for budget in ours]
        if any(equal_time[budget].trial.method.settings != usual[budget].trial.method.settings for budget in ours):
            chosen += [
                equal_time[budget].method(f"{cache}_equal_time", ", equal time", budget) for budget in ours
            ]
    return chosen


@dataclass(frozen=True, kw_only=True)
class _Best:
    trial: Trial
    target: float  # computed steps

    def method(self, name: str, suffix: str, budget: str) -> Method:
        """The setting as a row, with what the tuning saw."""
        settings = {
            **self.trial.method.settings,
            "target_computed_steps": round(self.target, 2),
            "tuning_computed_steps": round(self.trial.computed, 2),
            "tuning_psnr": round(self.trial.psnr, 3),
        }
        label = self.trial.method.label + suffix
        return dataclasses.replace(self.trial.method, name=name, label=label, budget=budget, settings=settings)


def bisect_threshold(
    bench: Bench,
    make: Callable[[float], Method],
    target: float,
    known: Sequence[Trial],
    *,
    between: tuple[float, float],
    tries: int,
) -> list[Trial]:
    """New trials of thresholds, bisected on a logarithmic scale until one computes as many steps as the target.

    Args:
        bench: what they are run on.
        make: the method at a threshold, which its settings name `threshold`.
        target: computed steps; half a step off will do.
        known: earlier trials that differ in the threshold alone.
        between: lowest and highest threshold.
        tries: at most.
    """
    low, high = (math.log(end) for end in between)
    for trial in known:
        at = math.log(float(trial.method.settings["threshold"]))
        low, high = (max(low, at), high) if trial.computed >= target else (low, min(high, at))
    new: list[Trial] = []
    for _ in range(tries):
        if low >= high - 1e-3 or any(abs(trial.computed - target) < 0.5 for trial in [*known, *new]):
            break
        middle = (low + high) / 2
        new.append(bench.trial(make(math.exp(middle))))
        low, high = (middle, high) if new[-1].computed >= target else (low, middle)
    return new


def best_trial(trials: Sequence[Trial], target: float) -> Trial:
    """The best image among all settings no slower than the first one that reaches the target.

    Settings that are faster still are not shut out: a peer must not lose by being given more time.
    """
    slow_enough = [trial.computed for trial in trials if trial.computed >= target - 1e-9]
    limit = min(slow_enough) if slow_enough else max(trial.computed for trial in trials)
    return max((t for t in trials if t.computed <= limit + 1e-9), key=lambda trial: trial.psnr)


def _num_full(method: Method) -> float:
    return float(method.schedule.num_full if method.schedule else 0)


def _affordable(ours: float, eager: float, plain: float, num_steps: int, eager_trial: Trial) -> float:
    """Computed steps that take as long as our run, by linear interpolation between the two extremes."""
    fewest = eager_trial.computed
    if plain <= eager:
        return fewest
    steps = fewest + (ours - eager) * (num_steps - fewest) / (plain - eager)
    return min(max(steps, fewest), float(num_steps))


def _seconds(bench: Bench, methods: Sequence[Method], repeats: int) -> list[float]:
    """Median seconds of the plain run and of each method's; all take turns."""
    taken: list[list[float]] = [[] for _ in range(1 + len(methods))]
    arguments = (bench.prompts, bench.seeds)
    for _ in range(repeats):
        taken[0].append(timed_sample(bench.pipe, *arguments, bench.call, bench.batch_size)[1])
        for method, values in zip(methods, taken[1:], strict=True):
            with method.using(bench.pipe, bench.sigmas):
                call = method.call(bench.call)
                values.append(timed_sample(bench.pipe, *arguments, call, bench.batch_size)[1])
    return [statistics.median(values) for values in taken]


def _operations(bench: Bench, ours: Sequence[Method], eager: Sequence[Trial]) -> list[float]:
    """Operations of the plain run and of each method's, a sample and branch."""
    with probe(bench.pipe, deep=True) as trace:
        sample(bench.pipe, bench.prompts[:1], bench.seeds[:1], bench.call, batch_size=1)
    assert trace.shapes.call is not None, "the plain run calls the transformer"
    model = count_transformer(bench.pipe.transformer, *trace.shapes.call)
    return [
        bench.call.num_inference_steps * model.total,
        *(method.flops(model, _num_full(method), bench.sigmas) for method in ours),
        *(trial.method.flops(model, trial.computed, bench.sigmas) for trial in eager),
    ]
