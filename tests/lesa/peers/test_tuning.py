from __future__ import annotations

import ast

import pytest
import torch
from diffusers import MagCacheConfig

from lesa.models.pipelines import sample
from lesa.models.probe import probe
from lesa.peers import tuning
from lesa.peers.caches import mag_cache_method, mag_cache_steps, magnitude_ratios, tuned_caches
from lesa.peers.method import Method, lesa_method
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
