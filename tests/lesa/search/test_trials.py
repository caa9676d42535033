"""Schedules that have plainly lost are run on a few trajectories only, and what they came to is said fairly."""

from __future__ import annotations

import math

import pytest
import torch

from lesa.search.trials import STRIDE, WORST, Trial, run_trial

PLACES = range(100, 132)


def errors(shift: float, spread: float = 0.1, seed: int = 0) -> dict[int, float]:
    """Errors that vary much from one trajectory to the next, and little from one schedule to the next."""
    shared = torch.randn(len(PLACES), generator=torch.Generator().manual_seed(7)) * 3 - 40
    own = torch.randn(len(PLACES), generator=torch.Generator().manual_seed(seed + 1)) * spread
    return {place: float(a + b) + shift for place, a, b in zip(PLACES, shared, own, strict=True)}


def trial(table: dict[int, float], incumbent: Trial | None = None) -> tuple[Trial, list[list[int]]]:
    asked: list[list[int]] = []

    def run(places: list[int]) -> list[float]:
        asked.append(places)
        return [table[place] for place in places]

    return run_trial(PLACES, run, incumbent), asked


def test_without_a_rival_all_are_run_and_the_error_is_their_mean() -> None:
    table = errors(0.0)
    found, asked = trial(table)
    assert [place for places in asked for place in places] == list(PLACES)
    assert {len(places) for places in asked} == {STRIDE}
    assert found.error == pytest.approx(sum(table.values()) / len(table)) and len(found.errors) == len(PLACES)


def test_a_plain_loser_is_run_on_the_first_ones_and_stands_where_it_would_have_stood() -> None:
    best, _ = trial(errors(0.0))
    worse = errors(0.5, seed=1)
    found, asked = trial(worse, best)
    assert asked == [list(PLACES)[:STRIDE]] and len(found.errors) == STRIDE
    # Its first trajectories are no measure by themselves: only the differences are.
    of_first = sum(found.errors) / STRIDE
    of_all = sum(worse.values()) / len(worse)
    assert abs(of_first - of_all) > 0.3 > 0.1 > abs(found.error - of_all)
    assert found.error > best.error


def test_a_winner_is_run_on_all() -> None:
    best, _ = trial(errors(0.0))
    better = errors(-0.3, seed=2)
    found, asked = trial(better, best)
    assert len(asked) == len(PLACES) // STRIDE
    assert found.error == pytest.approx(sum(better.values()) / len(better)) and found.error < best.error


def test_few_winners_are_lost_and_most_losers_stop_early() -> None:
    best, _ = trial(errors(0.0))
    lost = sum(len(trial(errors(-0.1, seed=seed), best)[0].errors) < len(PLACES) for seed in range(200))
    ran = [len(trial(errors(0.2, seed=seed), best)[0].errors) for seed in range(200)]
    assert lost <= 10 and sum(ran) / len(ran) < 0.5 * len(PLACES)


def test_a_run_that_left_the_finite_numbers_is_the_worst_and_no_measure() -> None:
    table = errors(0.0)
    table[PLACES[3]] = math.nan
    broken, asked = trial(table)
    assert broken.error == WORST and len(asked) == 1 and all(map(math.isfinite, broken.errors))
    found, asked = trial(errors(5.0), broken)
    assert len(asked) == len(PLACES) // STRIDE and found.error < WORST
    assert Trial.of([math.inf]).error == WORST
