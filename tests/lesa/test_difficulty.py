"""What the first feature says of each budget's PSNR, and the levels that keep the mean number of full steps."""

from __future__ import annotations

import pytest
import torch

from lesa.by_need import cheapest, levels, menu
from lesa.difficulty import Difficulty, fit, pooled
from lesa.schedule import Schedule


def test_pooled_is_mean_and_deviation_over_tokens_and_the_mean_over_branches() -> None:
    feature = torch.tensor([[[1.0, 2.0], [3.0, 2.0]]])
    assert pooled([feature]).tolist() == [[2.0, 2.0, 1.0, 0.0]]
    assert pooled([feature, 3 * feature]).tolist() == [[4.0, 4.0, 2.0, 0.0]]
    assert pooled([feature.bfloat16()]).dtype == torch.float32


def test_the_regression_finds_what_is_linear_and_ignores_what_is_not_there() -> None:
    generator = torch.Generator().manual_seed(0)
    regressors = torch.randn(300, 6, generator=generator) * 3 + 1
    noise = torch.randn(300, 2, generator=generator)
    true = torch.stack([50 + 2 * regressors[:, 0], 40 - regressors[:, 3]], dim=1)
    found, left_out = fit(regressors, true + 0.1 * noise)
    fresh = torch.randn(50, 6, generator=generator) * 3 + 1
    said = found.of_pooled(fresh)
    assert torch.allclose(said[:, 0], 50 + 2 * fresh[:, 0], atol=0.3)
    assert torch.allclose(left_out, true, atol=0.6)
    _, left_out = fit(regressors, 50 + noise)  # nothing to find
    assert float((left_out - 50).abs().max()) < 0.5  # a mean, near enough, and no sample knows its own value


def test_left_out_is_what_a_fit_without_the_sample_says() -> None:
    generator = torch.Generator().manual_seed(1)
    regressors, values = torch.randn(12, 4, generator=generator), torch.randn(12, 1, generator=generator)
    _, left_out = fit(regressors, values)
    # By hand, with the centre and scale of all samples and the ridge that was chosen: one of the list says it exactly.
    from lesa.difficulty import RIDGES

    x = ((regressors - regressors.mean(0)) / regressors.std(0, correction=0)).double()
    x = torch.cat([x, torch.ones(12, 1)], dim=1)
    errors = []
    for ridge in RIDGES:
        penalty = torch.diag(torch.tensor([12 * ridge] * 4 + [0.0], dtype=torch.float64))
        said = []
        for out in range(12):
            kept = [i for i in range(12) if i != out]
            weights = torch.linalg.solve(x[kept].T @ x[kept] + penalty, x[kept].T @ values[kept].double())
            said.append(x[out] @ weights)
        errors.append(float((torch.stack(said) - left_out.double()).abs().max()))
    assert min(errors) < 1e-5


def test_tensors_are_checked_all_at_once() -> None:
    good, _ = fit(torch.randn(9, 4, generator=torch.Generator().manual_seed(2)), torch.rand(9, 3))
    again = Difficulty.from_tensors(good.tensors(), channels=2, budgets=3)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), good.tensors().values(), strict=True))
    bad = good.tensors() | {"scale": torch.zeros(3), "more": torch.zeros(1)}
    bad["intercept"] = torch.tensor([1.0, float("nan"), 2.0])
    del bad["center"]
    with pytest.raises(ValueError) as caught:
        Difficulty.from_tensors(bad, channels=2, budgets=3)
    for words in ("center: missing", "more: unknown", "scale: has shape (3,)", "intercept: is not finite"):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="scale: must be above zero"):
        Difficulty.from_tensors(good.tensors() | {"scale": torch.zeros(4)}, channels=2, budgets=3)


def test_the_menu_has_the_best_budget_of_each_number_of_full_steps() -> None:
    schedules = {
        "5x": Schedule.explicit(20, (0, 3, 7, 12)),
        "5x-even": Schedule.explicit(20, (0, 5, 10, 15)),
        "2x": Schedule.explicit(20, tuple(range(0, 20, 2))),
        "10x": Schedule.explicit(20, (0, 9)),
    }
    assert menu(schedules, {"5x": 40.0, "5x-even": 41.0}) == ("10x", "5x-even", "2x")
    assert menu(schedules, {}) == ("10x", "5x", "2x")


def test_each_sample_gets_the_cheapest_budget_expected_to_do() -> None:
    expected = torch.tensor([[40.0, 45.0, 50.0], [46.0, 51.0, 56.0], [30.0, 35.0, 40.0]])
    assert cheapest(expected, 45.0).tolist() == [1, 0, 2]
    assert cheapest(expected, 99.0).tolist() == [2, 2, 2]


def test_levels_keep_the_mean_number_of_full_steps() -> None:
    generator = torch.Generator().manual_seed(3)
    ease = 4 * torch.randn(400, 1, generator=generator)
    expected = torch.tensor([[44.0, 49.0, 55.0, 65.0]]) + ease
    counts = [6, 8, 10, 16]
    found = levels(expected, ["8x", "6.25x", "5x", "3x"], counts)
    assert set(found) == {"6.25x", "5x"} and found["6.25x"] < found["5x"]
    for name, count in (("6.25x", 8), ("5x", 10)):
        chosen = torch.tensor(counts)[cheapest(expected, found[name])].float()
        assert abs(float(chosen.mean()) - count) < 0.05
        assert len(chosen.unique()) > 2


def test_where_samples_do_not_differ_all_get_what_was_asked_for() -> None:
    expected = torch.tensor([[44.0, 49.0, 55.0]]) + 0.01 * torch.arange(20.0)[:, None]
    found = levels(expected, ["8x", "6.25x", "5x"], [6, 8, 10])
    assert set(found) == {"6.25x"}
    # Far from what any of them is expected to have: rounding changes nothing.
    assert 45.0 < found["6.25x"] < 48.9
    assert cheapest(expected, found["6.25x"]).tolist() == [1] * 20
