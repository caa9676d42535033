"""Schedules that are plainly worse are run on a few trajectories only, and their errors are estimated fairly."""

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


def test_without_an_incumbent_all_are_run_and_the_error_is_their_mean() -> None:
    table = errors(0.0)
    made, asked = trial(table)
    assert [place for places in asked for place in places] == list(PLACES)
    assert {len(places) for places in asked} == {STRIDE}
    assert made.error == pytest.approx(sum(table.values()) / len(table)) and len(made.errors) == len(PLACES)


def test_an_eliminated_schedule_is_run_on_the_first_ones_and_its_estimate_is_near_its_error() -> None:
    best, _ = trial(errors(0.0))
    worse = errors(0.5, seed=1)
    made, asked = trial(worse, best)
    assert asked == [list(PLACES)[:STRIDE]] and len(made.errors) == STRIDE
    # Its first trajectories are no measure by themselves: only the differences are.
    first_mean = sum(made.errors) / STRIDE
    whole_mean = sum(worse.values()) / len(worse)
    assert abs(first_mean - whole_mean) > 0.3 > 0.1 > abs(made.error - whole_mean)
    assert made.error > best.error


def test_a_better_schedule_is_run_on_all() -> None:
    best, _ = trial(errors(0.0))
    better = errors(-0.3, seed=2)
    made, asked = trial(better, best)
    assert len(asked) == len(PLACES) // STRIDE
    assert made.error == pytest.approx(sum(better.values()) / len(better)) and made.error < best.error


def test_few_better_ones_are_eliminated_and_most_worse_ones_stop_early() -> None:
    best, _ = trial(errors(0.0))
    eliminated = sum(len(trial(errors(-0.1, seed=seed), best)[0].errors) < len(PLACES) for seed in range(200))
    ran = [len(trial(errors(0.2, seed=seed), best)[0].errors) for seed in range(200)]
    assert eliminated <= 10 and sum(ran) / len(ran) < 0.5 * len(PLACES)


def test_a_run_that_left_the_finite_numbers_is_the_worst_and_no_measure() -> None:
    table = errors(0.0)
    table[PLACES[3]] = math.nan
    broken, asked = trial(table)
    assert broken.error == WORST and len(asked) == 1 and all(map(math.isfinite, broken.errors))
    made, asked = trial(errors(5.0), broken)
    assert len(asked) == len(PLACES) // STRIDE and made.error < WORST
    assert Trial.of([math.inf]).error == WORST
