"""Training-free rules against hand numbers and against TaylorSeer's own way of accumulating."""

from __future__ import annotations

import pytest
import torch

from lesa.peers.rules import RULES, Taylor, chebyshev_weights, hermite, taylor_difference
from lesa.predictor.rule import History
from lesa.schedule import Schedule

SCHEDULE, SIGMAS = Schedule.uniform(10, 4), torch.linspace(1, 0, 11)


def history_of(values: dict[int, float], size: int) -> History:
    history = History(size)
    for step, value in values.items():
        history.push(step, torch.full((1, 2, 3), value))
    return history


def predict(rule_name: str, values: dict[int, float], step: int) -> float:
    rule = RULES[rule_name](SCHEDULE, SIGMAS)
    prediction = rule(history_of(values, rule.history_size), step)
    assert prediction.shape == (1, 2, 3)
    return float(prediction[0, 0, 0])


def test_reuse_gives_the_newest_feature() -> None:
    assert predict("reuse", {0: 1.0, 3: 7.0}, 5) == 7.0


def test_first_order_is_exact_for_lines_on_uneven_gaps() -> None:
    line = {step: 5.0 - 2.0 * step for step in (0, 1, 2, 3, 7)}
    for step in (8, 9, 12):
        assert predict("taylor1", line, step) == pytest.approx(5.0 - 2.0 * step)
        assert predict("taylor2", line, step) == pytest.approx(5.0 - 2.0 * step)


def test_second_order_by_hand() -> None:
    # s^2 at 0, 2, 4: D1 = 6, D1 before = 2, D2 = 2; at 6: 16 + 6*2 + 2*2^2/2 = 32.
    assert predict("taylor2", {0: 0.0, 2: 4.0, 4: 16.0}, 6) == pytest.approx(32.0)
    # s^2 at 0, 1, 4: D1 = 5, D1 before = 1, D2 = 4/3; at 6: 16 + 5*2 + (4/3)*2^2/2.
    assert predict("taylor2", {0: 0.0, 1: 1.0, 4: 16.0}, 6) == pytest.approx(16 + 10 + 8 / 3)
    assert predict("taylor1", {0: 0.0, 1: 1.0, 4: 16.0}, 6) == pytest.approx(26.0)


def test_a_young_run_uses_the_order_it_has() -> None:
    assert predict("taylor2", {0: 3.0}, 1) == 3.0
    assert predict("taylor2", {0: 3.0, 1: 5.0}, 3) == pytest.approx(9.0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_differences_are_those_taylorseer_accumulates(order: int) -> None:
    """TaylorSeer keeps the differences of the full step before and divides by the newest gap at every order."""
    generator = torch.Generator().manual_seed(order)
    rule = Taylor(order=order, name="taylor", history_size=order + 1)
    history = History(rule.history_size)
    kept: dict[int, torch.Tensor] = {}
    last = None
    for step in (0, 1, 2, 3, 7, 11, 12, 20):
        feature = torch.randn(1, 2, 3, generator=generator, dtype=torch.float64)
        fresh = {0: feature}
        for i in range(order):
            if last is not None and i in kept:
                fresh[i + 1] = (fresh[i] - kept[i]) / (step - last)
        kept, last = fresh, step
        history.push(step, feature)
        for ahead in (1, 2, 5):
            factorials = {0: 1, 1: 1, 2: 2, 3: 6}
            expected = sum(kept[i] * ahead**i / factorials[i] for i in kept)
            torch.testing.assert_close(rule(history, step + ahead), expected)


@pytest.mark.parametrize("name", list(RULES))
def test_rules_leave_the_history_alone(name: str) -> None:
    rule = RULES[name](SCHEDULE, SIGMAS)
    assert not rule.keeps_predictions and rule.name == name
    history = history_of({0: 1.0, 1: 4.0, 2: 9.0}, rule.history_size)
    before = [feature.clone() for feature in history.features]
    first, second = rule(history, 5), rule(history, 5)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, history.features, strict=True))


def test_differences_are_made_once_an_anchor() -> None:
    rule = RULES["taylor2"](SCHEDULE, SIGMAS)
    history = history_of({0: 1.0, 1: 4.0, 2: 9.0}, 3)
    rule(history, 4)
    made = dict(history.memo)
    assert set(made) == {("taylor", 1), ("taylor", 2)}
    rule(history, 5)
    assert all(history.memo[key] is made[key] for key in made)
    assert float(taylor_difference(history.features, history.steps, 2)[0, 0, 0]) == 2.0


def test_hermite_polynomials_are_the_physicists() -> None:
    import numpy as np

    for order in range(5):
        coefficients = np.eye(5)[order]
        for x in (-1.5, 0.0, 0.3, 2.0):
            assert hermite(order, x) == pytest.approx(np.polynomial.hermite.hermval(x, coefficients))


def test_hicache_by_hand() -> None:
    # s^2 at 0, 2, 4: D1 = 6, D2 = 2; at 6, with c = 1/2: c H1(c 2) = 1, c^2 H2(c 2) / 2 = (4 - 2) / 8.
    assert predict("hicache", {0: 0.0, 2: 4.0, 4: 16.0}, 6) == pytest.approx(16 + 6 * 1 + 2 * 0.25)
    first = RULES["hicache"](SCHEDULE, SIGMAS, order=1, contraction=0.5**0.5)  # 2 c^2 = 1: Taylor's first order
    history = history_of({0: 1.0, 3: 7.0}, 2)
    assert float(first(history, 5)[0, 0, 0]) == pytest.approx(11.0)


def test_taylor_in_sigma_is_exact_for_lines_in_sigma() -> None:
    sigmas = torch.tensor([1.0, 0.99, 0.97, 0.9, 0.7, 0.65, 0.4, 0.3, 0.2, 0.1, 0.0])
    rule = RULES["taylor1_sigma"](SCHEDULE, sigmas)
    history = history_of({step: 3.0 * float(sigmas[step]) - 1.0 for step in (0, 1, 3)}, 2)
    for step in (4, 7):
        assert float(rule(history, step)[0, 0, 0]) == pytest.approx(3.0 * float(sigmas[step]) - 1.0, abs=1e-5)
    in_steps = RULES["taylor1"](SCHEDULE, sigmas)
    assert float(in_steps(history, 7)[0, 0, 0]) != pytest.approx(3.0 * float(sigmas[7]) - 1.0, abs=1e-2)


def test_spectrum_reproduces_what_its_series_can_say() -> None:
    steps, num_steps = (13, 9, 8, 3, 1, 0), 20
    parabola = [0.3 * s * s - 2.0 * s + 1.0 for s in steps]
    weights = chebyshev_weights(steps, 17, num_steps=num_steps, degree=3, ridge=1e-10, blend=1.0)
    assert sum(w * value for w, value in zip(weights, parabola, strict=True)) == pytest.approx(
        0.3 * 17 * 17 - 2.0 * 17 + 1.0, abs=1e-3
    )
    line = chebyshev_weights(steps, 17, num_steps=num_steps, degree=3, ridge=0.1, blend=0.0)
    assert line == pytest.approx([2.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    half = chebyshev_weights(steps, 17, num_steps=num_steps, degree=3, ridge=1e-10, blend=0.5)
    assert half == pytest.approx([(a + b) / 2 for a, b in zip(weights, line, strict=True)])


def test_spectrum_solves_the_ridge_regression() -> None:
    """Against the normal equations of the stacked system, channel by channel."""
    import numpy as np

    steps, values = (7, 3, 2, 1, 0), np.array([2.0, -1.0, 0.5, 4.0, 3.0])
    points = np.array([*steps, 9]) / 5 - 1
    design = np.polynomial.chebyshev.chebvander(points, 4)
    stacked = np.vstack([design[:-1], np.sqrt(0.1) * np.eye(5)])
    coefficients = np.linalg.lstsq(stacked, np.concatenate([values, np.zeros(5)]), rcond=None)[0]
    rule = RULES["spectrum"](SCHEDULE, SIGMAS)
    history = history_of(dict(zip(reversed(steps), reversed(values.tolist()), strict=True)), rule.history_size)
    assert float(rule(history, 9)[0, 0, 0]) == pytest.approx(float(design[-1] @ coefficients), abs=1e-4)


def test_weighted_sums_do_not_round_between() -> None:
    """Weights that cancel: in bfloat16 the sum would be off by far more than its own rounding."""
    rule = RULES["spectrum"](SCHEDULE, SIGMAS)
    fine, coarse = History(rule.history_size), History(rule.history_size)
    generator = torch.Generator().manual_seed(0)
    for step in (0, 1, 2, 3, 7):
        feature = (100.0 + torch.randn(1, 4, 8, generator=generator)).bfloat16()
        coarse.push(step, feature)
        fine.push(step, feature.float())
    said = rule(coarse, 9)
    assert said.dtype == torch.bfloat16
    assert torch.equal(said, rule(fine, 9).bfloat16())
