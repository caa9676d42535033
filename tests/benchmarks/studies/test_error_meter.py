"""What the error meter is asked: on numbers made by hand."""

from __future__ import annotations

import numpy as np

from benchmarks.studies.error_meter import analyse, correlation, given_by_need, predicted, table

FULL = {"fast": 4, "default": 6, "slow": 8}


def test_a_linear_relation_is_found_and_noise_is_not() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 2))
    y = 3.0 * x[:, 0] - x[:, 1] + 5.0
    assert correlation(predicted(x, y), y) > 0.999
    assert abs(correlation(predicted(x, y), random.normal(size=400))) < 0.15


def test_steps_given_by_need_lift_the_tail_at_the_same_mean() -> None:
    base = np.linspace(40.0, 60.0, 101)
    true = {"fast": base - 5.0, "default": base, "slow": base + 5.0}
    found = given_by_need(true, true, FULL, "default")
    assert abs(found["mean_full_steps"] - 6) < 0.05
    assert found["psnr_p5"] > np.percentile(base, 5) + 4.0


def test_steps_given_blindly_lift_nothing() -> None:
    random = np.random.default_rng(1)
    base = random.normal(50.0, 3.0, size=2000)
    true = {"fast": base - 5.0, "default": base, "slow": base + 5.0}
    shuffled = random.permutation(base)
    found = given_by_need({"fast": shuffled - 5.0, "default": shuffled, "slow": shuffled + 5.0}, true, FULL, "default")
    assert found["psnr_p5"] < np.percentile(base, 5)


def test_the_table_has_every_budget() -> None:
    random = np.random.default_rng(2)
    errors = random.uniform(0.01, 0.1, size=(64, 4))
    found = {name: (50.0 + count - 20 * errors[:, 0], errors) for name, count in FULL.items()}
    document = {"workload": "tiny", "samples": 64, "prompts": 32, **analyse(found, FULL, "default")}
    assert document["budgets"]["slow"]["r_by_errors_seen"][0] > 0.9
    assert document["giving"]["oracle"]["psnr_p5"] >= document["giving"]["meter"]["psnr_p5"] - 1e-9
    text = table(document)
    assert all(f"| {name} |" in text for name in FULL)
