from __future__ import annotations

import cmath

import pytest
import torch

from lesa.models.flops import ModelFlops
from lesa.peers.dmd import DMD, equally_spaced
from lesa.peers.rules import RULES, rule_flops
from lesa.predictor.rule import History
from lesa.schedule import Schedule
from tests.lesa.peers.test_rules import SCHEDULE, SIGMAS


def history_of(steps: list[int], trajectory, size: int = 6) -> History:
    history = History(size)
    for step in steps:
        history.push(step, trajectory(step))
    return history


def exponentials(eigenvalues: list[complex], seed: int = 0):
    """Features [1, 4, 8] that are a sum of exponentials: those given and their conjugates."""
    generator = torch.Generator().manual_seed(seed)
    modes = [torch.randn(1, 4, 8, 2, generator=generator, dtype=torch.float64) for _ in eigenvalues]

    def at(step: float) -> torch.Tensor:
        return sum((torch.view_as_complex(m) * v**step).real for m, v in zip(modes, eigenvalues, strict=True)).float()

    return at


def test_a_geometric_sequence_by_hand() -> None:
    history = history_of([0, 2, 4], lambda step: torch.full((1, 1, 2), 2.0 ** (step / 2)))  # 1, 2, 4
    rule = DMD()
    assert rule(history, 6).flatten().tolist() == pytest.approx([8.0, 8.0])
    assert rule(history, 5).flatten().tolist() == pytest.approx([32**0.5] * 2)


@pytest.mark.parametrize(
    "eigenvalues",
    [[0.9], [1.0, 0.8], [0.95 * cmath.exp(0.2j)], [1.0, 0.97 * cmath.exp(0.1j)], [1.02, 0.9, 0.7]],
)
def test_it_is_exact_for_sums_of_exponentials(eigenvalues: list[complex]) -> None:
    trajectory = exponentials([complex(value) for value in eigenvalues])
    history = history_of([0, 1, 2, 5, 8, 11, 14, 17], trajectory)
    for step in (18, 19, 20, 22):
        torch.testing.assert_close(DMD()(history, step), trajectory(step), atol=2e-3, rtol=2e-3)


def test_samples_are_fitted_one_by_one() -> None:
    first, second = exponentials([1.0, 0.8]), exponentials([0.9 * cmath.exp(0.2j)], seed=1)
    both = history_of([0, 3, 6, 9], lambda step: torch.cat([first(step), second(step)]))
    said = DMD()(both, 11)
    for index, alone in enumerate((first, second)):
        torch.testing.assert_close(said[index : index + 1], DMD()(history_of([0, 3, 6, 9], alone), 11))


def test_fewer_modes_are_a_smoother_fit() -> None:
    """One mode is one factor for all channels: the projection of the newest feature times it."""
    trajectory = exponentials([1.0, 0.5])
    said = DMD(rank=1)(history_of([0, 1, 2, 3], trajectory), 4)
    assert not torch.allclose(said, trajectory(4), atol=1e-2)
    assert torch.isfinite(said).all()


def test_without_three_equally_spaced_steps_it_is_the_line() -> None:
    line = RULES["taylor1"](SCHEDULE, SIGMAS)
    for steps in ([0], [0, 1], [0, 1, 4], [0, 1, 2, 7]):
        history = history_of(steps, exponentials([1.0, 0.8]))
        torch.testing.assert_close(DMD()(history, 9), line(history, 9))
    assert [equally_spaced(steps) for steps in ((4,), (4, 2), (4, 2, 0), (9, 6, 3, 2, 1))] == [1, 2, 3, 3]


def test_constant_and_zero_features_stay_as_they_are() -> None:
    for value in (0.0, 3.0):
        history = history_of([0, 1, 2, 3], lambda step, value=value: torch.full((2, 3, 4), value))
        torch.testing.assert_close(DMD()(history, 6), torch.full((2, 3, 4), value))


def test_bfloat16_features_give_bfloat16() -> None:
    trajectory = exponentials([1.0, 0.9])
    said = DMD(rank=2)(history_of([0, 3, 6, 9], lambda step: trajectory(step).bfloat16()), 11)
    assert said.dtype == torch.bfloat16
    torch.testing.assert_close(said.float(), trajectory(11), atol=0.05, rtol=0.05)


def test_its_operations_are_counted() -> None:
    model = ModelFlops(total=1.0, head=0.0, blocks=(), tokens=3, channels=5)
    schedule = Schedule.explicit(9, [0, 2, 4, 7])
    # After 0 nothing, after 2 a line, after 4 six inner products and two terms in each of two steps, after 7 a line.
    assert rule_flops(DMD(), schedule, model) == 15 * 2 * (0 + 1 + 6 + 2 * 2 + 1)
