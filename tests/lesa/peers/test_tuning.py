from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import MagCacheConfig

from lesa.models.pipelines import sample
from lesa.models.probe import probe
from lesa.peers import tuning
from lesa.peers.caches import mag_cache_method, mag_cache_steps, magnitude_ratios, tuned_caches
from lesa.peers.method import Method, lesa_method
from lesa.peers.tuning import best_trial, bisect_threshold
from lesa.schedule import Schedule
from tests.helpers.bundles import CALL, NUM_STEPS, extrapolating
from tests.helpers.evaluation import BUDGETS, pipeline, sigmas

PROMPTS, SEEDS = ["a red house", "the blue dog"], [7, 8]


def test_ratios_are_those_diffusers_calibrates(capsys) -> None:
    """One sample at a time, since theirs is the mean over a batch's tokens and ours over all samples."""
    pipe = pipeline()
    ours, images = magnitude_ratios(pipe, PROMPTS, SEEDS, CALL, batch_size=2)
    one_by_one, _ = magnitude_ratios(pipe, PROMPTS, SEEDS, CALL, batch_size=1)
    assert ours == pytest.approx(one_by_one, rel=1e-4)
    assert torch.equal(images, sample(pipe, PROMPTS, SEEDS, CALL))
    capsys.readouterr()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=NUM_STEPS))
    sample(pipe, PROMPTS, SEEDS, CALL, "latent")
    pipe.transformer.disable_cache()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    assert ours == pytest.approx(ast.literal_eval(printed[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("threshold", "retention", "max_skip"),
    [(0.0, 2, 3), (0.05, 0, 3), (0.3, 3, 10), (1e9, 0, 2), (1e9, 1, 10)],
)
def test_the_steps_of_mag_cache_are_foreseen(threshold: float, retention: int, max_skip: int) -> None:
    pipe = pipeline()
    ratios = [1.0, 1.2, 1.1, 1.04, 0.97, 1.01, 1.0, 0.95, 0.9, 0.8]
    method = mag_cache_method(
        "b",
        NUM_STEPS,
        ratios,
        threshold=threshold,
        retention_steps=retention,
        max_skip_steps=max_skip,
    )
    with method.using(pipe, sigmas()), probe(pipe) as trace:
        sample(pipe, PROMPTS[:1], SEEDS[:1], CALL, "latent")
    assert trace.computed == len(mag_cache_steps(ratios, threshold, retention, max_skip))


def test_caches_are_tuned_to_no_fewer_steps_than_ours() -> None:
    pipe = pipeline()
    predictor = extrapolating(pipe.transformer.inner_dim, sigmas(), BUDGETS["1.67x"])
    ours = {name: lesa_method(name, predictor, schedule) for name, schedule in BUDGETS.items()}
    seen: list[dict[str, float]] = []
    methods = tuned_caches(
        pipe,
        ours,
        call=CALL,
        prompts=PROMPTS,
        seeds=SEEDS,
        batch_size=2,
        repeats=1,
        report=lambda step, values: seen.append(values),
    )
    names = {method.name for method in methods}
    assert {"first_block_cache", "mag_cache"} <= names
    assert all({m.name for m in methods if m.budget == budget} == names for budget in BUDGETS)
    for method in methods:
        full = BUDGETS[method.budget].num_full
        target, found = method.settings["target_computed_steps"], method.settings["tuning_computed_steps"]
        if not method.name.endswith("_equal_time"):
            assert target >= full
        assert 1 <= found <= NUM_STEPS and method.settings["tuning_psnr"] > 0
    assert len(seen) >= len(methods)
    with pipe.transformer.cache_context("cond"):
        assert not pipe.transformer.is_cache_enabled


def test_no_setting_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried for one budget, or for equal full steps, serves the next."""
    tried: list[tuple[str, tuple[float, ...]]] = []
    real = tuning.Bench.trial

    def noted(self: tuning.Bench, method: Method) -> tuning.Trial:
        tried.append((method.name, tuple(method.settings.values())))
        return real(self, method)

    monkeypatch.setattr(tuning.Bench, "trial", noted)
    # One budget under two names: both ask for the same number of computed steps, at equal full steps and in equal time.
    taken = [1.0, 0.6, 0.6]  # seconds of the plain run and of ours
    monkeypatch.setattr(tuning, "_seconds", lambda bench, methods, repeats: taken + [0.3] * (len(methods) - 2))
    pipe = pipeline()
    schedule = BUDGETS["1.67x"]
    predictor = extrapolating(pipe.transformer.inner_dim, sigmas(), schedule)
    ours = {name: lesa_method(name, predictor, schedule) for name in ("one", "two")}
    methods = tuned_caches(pipe, ours, call=CALL, prompts=PROMPTS, seeds=SEEDS, batch_size=2, repeats=1)
    assert {method.budget for method in methods if method.name == "mag_cache"} == {"one", "two"}
    assert len([name for name, _ in tried if name == "mag_cache"]) > 2
    assert len(set(tried)) == len(tried)


def test_a_cache_that_skips_nothing_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where our run takes as long as the plain one, timing noise included, the peer still skips a step."""
    monkeypatch.setattr(tuning, "_seconds", lambda bench, methods, repeats: [1.0, 1.01, *[0.5] * (len(methods) - 1)])
    pipe = pipeline()
    schedule = Schedule.explicit(NUM_STEPS, [step for step in range(NUM_STEPS) if step != 4])
    predictor = extrapolating(pipe.transformer.inner_dim, sigmas(), schedule)
    ours = {"1.11x": lesa_method("1.11x", predictor, schedule)}
    methods = tuned_caches(pipe, ours, call=CALL, prompts=PROMPTS, seeds=SEEDS, batch_size=2, repeats=1)
    mag = next(method for method in methods if method.name == "mag_cache")
    assert mag.settings["target_computed_steps"] == schedule.num_full == NUM_STEPS - 1
    assert mag.settings["tuning_computed_steps"] == NUM_STEPS - 1


def cache(threshold: float = 0.1, name: str = "cache", budget: str = "", full: int = 0) -> Method:
    """A method that is never run; where it has full steps it stands for the predictor."""
    return Method(
        name=name, label=name, budget=budget, kind="cache", using=lambda pipe, sigmas: nullcontext(), num_steps=10,
        schedule=Schedule.explicit(10, range(full)) if full else None, settings={"threshold": threshold},
    )  # fmt: skip


def trial(computed: float, psnr: float) -> tuning.Trial:
    return tuning.Trial(method=cache(), computed=computed, psnr=psnr)


def test_the_best_image_among_those_no_slower_than_the_first_that_reaches_the_target() -> None:
    trials = [trial(3, 20.0), trial(4, 31.0), trial(5, 30.0), trial(8, 50.0)]
    assert best_trial(trials, 5).psnr == 31.0  # a faster one may be better; the slow one is out
    assert best_trial(trials, 3.5).psnr == 31.0 and best_trial(trials, 3).psnr == 20.0
    assert best_trial(trials, 9).psnr == 50.0  # none is slow enough


@pytest.mark.parametrize("ours, affordable", [(20.0, 1.0), (60.0, 5.5), (100.0, 10.0), (5.0, 1.0), (200.0, 10.0)])
def test_our_time_buys_steps_between_a_cache_s_fewest_and_all(ours: float, affordable: float) -> None:
    assert tuning._affordable(ours, 20.0, 100.0, 10, trial(1.0, 0.0)) == pytest.approx(affordable)


def bench(computed: Callable[[float], float]) -> Any:
    """A bench on which a threshold computes so many steps, and more of them make a better image."""

    def run(method: Method) -> tuning.Trial:
        steps = computed(method.settings["threshold"])
        return tuning.Trial(method=method, computed=steps, psnr=10 * steps)

    return SimpleNamespace(trial=run)


def test_the_threshold_is_bisected_towards_the_target() -> None:
    made = bench(lambda threshold: 10 / (1 + threshold))  # the higher the threshold the fewer steps
    trials = bisect_threshold(made, cache, 4.0, [], between=(1e-3, 1e3), tries=20)
    assert abs(trials[-1].computed - 4.0) < 0.5
    again = bisect_threshold(made, cache, 4.0, trials, between=(1e-3, 1e3), tries=20)
    assert again == [], "half a step off is known already"


def test_every_cache_is_charged_what_its_own_skipped_steps_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain 100, ours 40 and 60; a skipped run of the dear cache costs 50 and of the cheap one 10."""
    monkeypatch.setattr(tuning, "_operations", lambda bench, ours, eager: [100.0, 40.0, 60.0, 50.0, 10.0])
    asked: dict[tuple[str, float], None] = {}

    def search(name: str) -> tuning.CacheSearch:
        def find(bench: Any, target: float, trials: list[tuning.Trial]) -> tuning.Trial:
            asked[name, round(target, 3)] = None
            return tuning.Trial(method=cache(target, name), computed=target, psnr=target)

        return tuning.CacheSearch(name=name, eager=cache(tuning.EVERYTHING, name), search=find)

    ours = {"fast": cache(budget="fast", full=3), "slow": cache(budget="slow", full=5)}
    made = bench(lambda threshold: 1.0)
    methods = tuning.tune_caches(made, ours, [search("dear"), search("cheap")], cost="operations")
    # (40 - 10) of the 90 that nine steps cost, and (60 - 10); the dear one buys 0 and 1.8 steps above its first.
    assert {target for name, target in asked if name == "cheap"} == {4.0, 6.0}
    assert {target for name, target in asked if name == "dear"} == {1.0, 2.8, 3.0, 5.0}
    found = {(method.name, method.budget): method.settings["target_computed_steps"] for method in methods}
    assert found["dear", "fast"] == 3.0 and found["dear", "slow"] == 5.0, "as many full steps as ours, though slower"
    assert found["dear_equal_time", "slow"] == 2.8 and found["cheap", "slow"] == 6.0
