"""The local search that our schedules and the peers' share, on errors a person can work out."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from lesa.search.local_search import Move, in_turn, kicks, local_search, moved
from lesa.search.trials import Steps, Trial

BEST = (0, 4, 9)
STEPS = 12


def one_step(steps: Steps, generator: torch.Generator) -> list[Move]:
    """The second or the third step by one."""
    return [(0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0)]


def error(steps: Sequence[int]) -> float:
    return float(sum(abs(a - b) for a, b in zip(steps, BEST, strict=True)))


def full(steps: Steps, incumbent: Trial | None) -> Trial:
    return Trial.of([error(steps)])


def test_the_first_better_neighbour_is_taken_and_the_move_that_helped_comes_first() -> None:
    ends, done = local_search(
        full, [(0, 1, 6)], one_step, num_steps=STEPS, budget=50, seed=0, origins=in_turn(1)
    )
    assert ends == [BEST] and done.best == BEST and done.error(BEST) == 0.0
    # Three times the third step; a fourth is worse, so is one back; then the second one, which from there on is first.
    assert list(done.trials)[:8] == [
        (0, 1, 6), (0, 1, 7), (0, 1, 8), (0, 1, 9), (0, 1, 10), (0, 2, 9), (0, 3, 9), (0, 4, 9),
    ]  # fmt: skip
    assert done.count == len(done.trials)


def test_descents_begin_at_the_starts_in_turn_the_best_first_and_share_the_budget() -> None:
    starts = [(0, 1, 2), (0, 2, 6), (0, 3, 4)]  # of errors 10, 5, 6
    begun: list[tuple[Steps, int]] = []

    def noted(steps: Steps, generator: torch.Generator) -> list[Move]:
        begun.append((steps, generator.initial_seed()))
        return []

    ends, done = local_search(full, starts, noted, num_steps=STEPS, budget=10, seed=7, origins=in_turn(3, within=2.0))
    assert begun == [((0, 2, 6), 7), ((0, 3, 4), 8), ((0, 2, 6), 9)]  # the first start is too far behind
    assert ends == [steps for steps, _ in begun] and done.count == 3
    ends, done = local_search(full, starts, one_step, num_steps=STEPS, budget=7, seed=0, origins=in_turn(2))
    assert done.count == 7  # three starts, two for the first descent, what is left for the second
    assert ends == [(0, 2, 8), (0, 3, 6)]
    ends, done = local_search(full, starts, one_step, num_steps=STEPS, budget=2, seed=0, origins=in_turn(2))
    assert done.count == 2 and ends == [(0, 2, 6), (0, 1, 2)]  # the third start was never evaluated


def test_a_kicked_search_goes_on_from_the_best_and_ends_when_nothing_is_new() -> None:
    kicked: list[Steps] = []

    def kick(steps: Steps, generator: random.Random) -> Steps:
        kicked.append(steps)
        return (0, generator.randrange(1, 3), 9)

    calls: list[Steps] = []

    def evaluate(steps: Steps, incumbent: Trial | None) -> Trial:
        calls.append(steps)
        return full(steps, incumbent)

    def only_second(steps: Steps, generator: torch.Generator) -> list[Move]:
        return [(0, 1, 0), (0, -1, 0)]

    _, done = local_search(
        evaluate, [(0, 1, 9)], only_second, num_steps=STEPS, budget=20, seed=3, origins=kicks(kick)
    )
    assert done.best == BEST and set(kicked) == {BEST}
    assert len(calls) == len(set(calls)) == done.count < 20


def test_an_estimate_is_evaluated_again_before_it_can_win() -> None:
    """Two samples are a trial in full; what the incumbent of one descent eliminated, another descent may want."""
    asked: list[tuple[Steps, bool]] = []

    def raced(steps: Steps, incumbent: Trial | None) -> Trial:
        asked.append((steps, incumbent is None))
        errors = [error(steps)] * 2
        return Trial.of(errors[:1] if incumbent and errors[0] > incumbent.error else errors, incumbent)

    starts = [(0, 4, 10), (0, 4, 5)]
    ends, done = local_search(
        raced, starts, one_step, num_steps=STEPS, budget=60, seed=0, origins=in_turn(2), samples=2
    )
    assert ends == [BEST, BEST] and [alone for _, alone in asked[:2]] == [True, True]
    repeated = {steps for steps, _ in asked if [steps for steps, _ in asked].count(steps) > 1}
    assert repeated == {(0, 4, 8)}  # behind BEST in the first descent, better than its incumbent in the second
    assert len(done.trials[0, 4, 8].errors) == 2 and done.count == len(asked)


def test_what_is_not_allowed_is_not_evaluated() -> None:
    ends, done = local_search(
        full,
        [(0, 1, 6)],
        one_step,
        num_steps=STEPS,
        budget=50,
        seed=0,
        origins=in_turn(1),
        allowed=lambda steps: steps[1] < 3,
    )
    assert ends == [(0, 2, 9)] and all(steps[1] < 3 for steps in done.trials)


def test_moves_that_leave_the_run_or_cross_are_no_neighbours() -> None:
    every = [(0, 1, 0), (0, 0, 1), (0, 1, 1), (0, -1, 0), (0, 1, 0), (0, 4, 0)]
    assert [candidate for _, candidate in moved((0, 1, 3), every, 4)] == [(0, 2, 3)]
    assert dict(moved((0, 1, 3), every, 6)) == {(0, 1, 0): (0, 2, 3), (0, 0, 1): (0, 1, 4), (0, 1, 1): (0, 2, 4)}


def test_all_that_is_wrong_with_starts_is_named() -> None:
    def search(starts: list[Steps], budget: int) -> None:
        local_search(full, starts, one_step, num_steps=20, budget=budget, seed=0, origins=in_turn(1))

    with pytest.raises(ValueError, match="budget must be at least 1.*as many steps.*does not increase"):
        search([(0, 2), (1, 2, 3)], 0)
    with pytest.raises(ValueError, match="at least one is needed"):
        search([], 5)
    with pytest.raises(ValueError, match="at most 19"):
        search([(0, 20)], 5)
