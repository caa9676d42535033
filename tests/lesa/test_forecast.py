"""Training-free rules against hand numbers and against TaylorSeer's own way of accumulating."""

from __future__ import annotations

import pytest
import torch

from lesa.forecast import RULES, Taylor, taylor_difference
from lesa.history import History
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
    assert set(made) == {1, 2}
    rule(history, 5)
    assert all(history.memo[order] is made[order] for order in made)
    assert float(taylor_difference(history.features, history.steps, 2)[0, 0, 0]) == 2.0
