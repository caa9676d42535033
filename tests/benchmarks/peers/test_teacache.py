from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.peers.teacache import UNSCALED, fitted_polynomial, teacache, teacache_method, tuned_teacache
from lesa.models.pipelines import sample
from lesa.models.probe import probe
from lesa.peers.tuning import Bench
from lesa.schedule import Schedule
from tests.helpers.bundles import CALL, NUM_STEPS
from tests.helpers.evaluation import pipeline, sigmas

PROMPTS, SEEDS = ["a red house", "the blue dog"], [7, 8]


def drawn(threshold: float, polynomial=(1.0, 0.0)) -> tuple[torch.Tensor, int]:
    pipe = pipeline()
    with teacache_method("b", NUM_STEPS, polynomial, threshold).using(pipe, sigmas()), probe(pipe) as trace:
        return sample(pipe, PROMPTS, SEEDS, CALL, "latent"), trace.computed


def test_nothing_is_skipped_below_zero_and_all_but_the_ends_above_everything() -> None:
    plain = sample(pipeline(), PROMPTS, SEEDS, CALL, "latent")
    found, computed = drawn(0.0)
    assert computed == NUM_STEPS and torch.equal(found, plain)
    found, computed = drawn(1e9)
    assert computed == 2 and not torch.equal(found, plain)
    assert torch.equal(sample(pipeline(), PROMPTS, SEEDS, CALL, "latent"), plain)
    again, _ = drawn(1e9)
    assert torch.equal(again, found)  # nothing is left over from run to run


def test_steps_are_full_where_the_changes_add_up() -> None:
    pipe = pipeline()
    with teacache(pipe, [0.0, 0.3], 0.5) as cache, probe(pipe) as trace:  # every step counts 0.3, whatever it changes
        sample(pipe, PROMPTS, SEEDS, CALL, "latent")
    # full at 0, then every second step (0.6 >= 0.5), and at the last step
    assert trace.computed == len({0, 2, 4, 6, 8, 9})
    assert cache.branches.keys() == {"#0"}


def test_a_skipped_step_adds_the_newest_residual() -> None:
    pipe = pipeline()
    features: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    block = pipe.transformer.transformer_blocks[0]
    embedded = pipe.transformer.x_embedder.register_forward_hook(lambda m, a, out: inputs.append(out))
    last = pipe.transformer.norm_out.register_forward_pre_hook(lambda m, a: features.append(a[0]))
    with teacache(pipe, [0.0], 1.0):  # no change at all: skipped until the last step
        sample(pipe, PROMPTS, SEEDS, CALL, "latent")
    embedded.remove()
    last.remove()
    residual = features[0] - inputs[0]
    for step in range(1, NUM_STEPS - 1):
        torch.testing.assert_close(features[step], inputs[step] + residual)
    assert not hasattr(block, "_diffusers_hook") or not block._diffusers_hook.hooks


def test_it_comes_off_after_an_error() -> None:
    pipe = pipeline()
    plain = sample(pipe, PROMPTS, SEEDS, CALL, "latent")
    with pytest.raises(KeyError), teacache(pipe, [0.0], 1.0):
        raise KeyError
    assert torch.equal(sample(pipe, PROMPTS, SEEDS, CALL, "latent"), plain)


def test_transformers_without_a_modulated_input_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    block = pipe.transformer.transformer_blocks[0]
    norm = block.norm1
    block.norm1 = torch.nn.Identity()
    try:
        with pytest.raises(ValueError, match="no modulated input"), teacache(pipe, [0.0], 1.0):
            pass
    finally:
        block.norm1 = norm


def test_the_polynomial_is_fitted_and_the_threshold_bisected() -> None:
    bench = Bench.of(pipeline(), PROMPTS, SEEDS, CALL, 2)
    polynomial = fitted_polynomial(bench)
    assert len(polynomial) == 5 and np.isfinite(polynomial).all()
    budgets = {"1.67x": Schedule.uniform(NUM_STEPS, 3), "1.43x": Schedule.uniform(NUM_STEPS, 2)}
    for method in tuned_teacache(bench, budgets):
        assert method.kind == "cache" and method.budget in budgets
        trial = bench.trial(method)
        assert trial.computed == method.settings["tuning_computed_steps"]
        assert trial.psnr == pytest.approx(method.settings["tuning_psnr"], abs=1e-3)
        # Without a polynomial thresholds are found that give as many full steps; the row is no worse than those.
        full = budgets[method.budget].num_full
        unscaled = [bench.trial(teacache_method("b", NUM_STEPS, UNSCALED, t)) for t in np.geomspace(1e-3, 3.0, 12)]
        assert trial.computed >= full or trial.psnr >= max(t.psnr for t in unscaled if t.computed <= full) - 0.5
