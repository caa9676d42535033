"""The peers' moves and kicks, and what the search that we share with them makes of these."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial

from benchmarks.peers.grid_search import guessed_optimum, insertions, kicked, moves, spread_starts
from lesa.search.local_search import kicks, local_search, moved
from lesa.search.trials import Steps, Trial

BEST = (0, 3, 5, 6, 11, 17)


def search(
    evaluate: Callable[[Steps], float], starts: Iterable[Steps], num_steps: int, *, budget: int, seed: int = 0
) -> Steps:
    """As `search_peers` searches."""
    _, done = local_search(
        lambda steps, incumbent: Trial.of([evaluate(steps)]),
        starts,
        moves,
        num_steps=num_steps,
        budget=budget,
        seed=seed,
        origins=kicks(partial(kicked, num_steps=num_steps)),
    )
    return done.best


def distance(steps: Steps) -> float:
    return float(sum(abs(a - b) for a, b in zip(steps, BEST, strict=True)))


def test_it_finds_the_only_optimum_and_judges_nothing_twice() -> None:
    judged: list[Steps] = []

    def evaluate(steps: Steps) -> float:
        judged.append(steps)
        return distance(steps)

    assert search(evaluate, spread_starts(20, 6), 20, budget=150) == BEST
    assert len(judged) == len(set(judged)) <= 150
    assert all(steps[0] == 0 and steps[-1] < 20 and list(steps) == sorted(set(steps)) for steps in judged)


def test_random_moves_leave_a_local_optimum() -> None:
    """A deep hole behind a ridge: no single small move leads there."""
    trap, hole = (0, 10, 12), (0, 12, 15)

    def evaluate(steps: Steps) -> float:
        if steps == hole:
            return -10.0
        return float(sum(abs(a - b) for a, b in zip(steps, trap, strict=True)))

    assert search(evaluate, [trap], 20, budget=9) == trap
    assert search(evaluate, [trap], 20, budget=400) == hole


def test_the_budget_holds_and_no_result_is_worse_than_a_start() -> None:
    for budget in (1, 2, 7, 40):
        calls: list[Steps] = []
        best = search(
            lambda steps, calls=calls: calls.append(steps) or distance(steps),  # type: ignore[func-returns-value]
            spread_starts(20, 6),
            20,
            budget=budget,
        )
        assert len(calls) <= budget
        assert distance(best) <= distance(spread_starts(20, 6)[0])


def test_it_ends_where_there_is_nothing_left_to_judge() -> None:
    calls: list[Steps] = []
    best = search(
        lambda steps: calls.append(steps) or -steps[1],  # type: ignore[func-returns-value]
        [(0, 1)],
        5,
        budget=50,
    )
    assert best == (0, 4) and sorted(calls) == [(0, n) for n in range(1, 5)]


def test_the_same_seed_finds_the_same() -> None:
    def rugged(steps: Steps) -> float:
        return random.Random(str(steps)).random()

    first = search(rugged, spread_starts(30, 5), 30, budget=60, seed=4)
    assert search(rugged, spread_starts(30, 5), 30, budget=60, seed=4) == first


def test_moves_keep_the_steps_in_order() -> None:
    around = [candidate for _, candidate in moved((0, 1, 5), moves((0, 1, 5)), 7)]
    assert around == [(0, 2, 5), (0, 1, 6), (0, 1, 4), (0, 2, 6)]
    assert moves((0,)) == [] and moves((0, 3)) == [(0, 1), (0, -1)]
    for seed in range(20):
        steps = kicked((0, 4, 9, 12), random.Random(seed), num_steps=15)
        assert steps[0] == 0 and list(steps) == sorted(set(steps)) and steps[-1] < 15 and len(steps) == 4


def test_one_more_step_may_lie_anywhere() -> None:
    assert insertions((0, 2), 5) == [(0, 1, 2), (0, 2, 3), (0, 2, 4)]


def test_starts_are_spread_in_several_ways() -> None:
    even, *others = spread_starts(50, 10)
    assert even == tuple(range(0, 50, 5))
    assert len(others) == 3 and all(len(start) == 10 for start in others)
    for count in (1, 2, 49, 50):
        for start in spread_starts(50, count):
            assert start[0] == 0 and len(set(start)) == count and max(start) < 50


def test_a_guess_is_followed_downhill() -> None:
    assert guessed_optimum(distance, (0, 1, 2, 3, 4, 5), 20) == BEST
