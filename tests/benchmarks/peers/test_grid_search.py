from __future__ import annotations

import random

import pytest

from benchmarks.peers.grid_search import Steps, guessed_optimum, insertions, kicked, moves, search_steps, spread_starts

BEST = (0, 3, 5, 6, 11, 17)


def distance(steps: Steps) -> float:
    return float(sum(abs(a - b) for a, b in zip(steps, BEST, strict=True)))


def test_it_finds_the_only_optimum_and_judges_nothing_twice() -> None:
    judged: list[Steps] = []
    seen: list[tuple[int, dict[str, float]]] = []

    def evaluate(steps: Steps) -> float:
        judged.append(steps)
        return distance(steps)

    found = search_steps(
        evaluate,
        spread_starts(20, 6),
        20,
        budget_of_evaluations=150,
        report=lambda number, values: seen.append((number, values)),
    )
    assert found == BEST
    assert len(judged) == len(set(judged)) <= 150
    assert all(steps[0] == 0 and steps[-1] < 20 and list(steps) == sorted(set(steps)) for steps in judged)
    assert [number for number, _ in seen] == list(range(1, len(judged) + 1))
    best = [values["best"] for _, values in seen]
    assert best == sorted(best, reverse=True) and best[-1] == 0.0


def test_random_moves_leave_a_local_optimum() -> None:
    """A deep hole behind a ridge: no single small move leads there."""
    trap, hole = (0, 10, 12), (0, 12, 15)

    def evaluate(steps: Steps) -> float:
        if steps == hole:
            return -10.0
        return float(sum(abs(a - b) for a, b in zip(steps, trap, strict=True)))

    assert search_steps(evaluate, [trap], 20, budget_of_evaluations=9) == trap
    assert search_steps(evaluate, [trap], 20, budget_of_evaluations=400) == hole


def test_the_budget_holds_and_no_result_is_worse_than_a_start() -> None:
    for budget in (1, 2, 7, 40):
        calls: list[Steps] = []
        found = search_steps(
            lambda steps, calls=calls: calls.append(steps) or distance(steps),  # type: ignore[func-returns-value]
            spread_starts(20, 6),
            20,
            budget_of_evaluations=budget,
        )
        assert len(calls) <= budget
        assert distance(found) <= distance(spread_starts(20, 6)[0])


def test_it_ends_where_there_is_nothing_left_to_judge() -> None:
    calls: list[Steps] = []
    found = search_steps(
        lambda steps: calls.append(steps) or -steps[1],  # type: ignore[func-returns-value]
        [(0, 1)],
        5,
        budget_of_evaluations=50,
    )
    assert found == (0, 4) and sorted(calls) == [(0, n) for n in range(1, 5)]


def test_the_same_seed_finds_the_same() -> None:
    def rugged(steps: Steps) -> float:
        return random.Random(str(steps)).random()

    first = search_steps(rugged, spread_starts(30, 5), 30, budget_of_evaluations=60, seed=4)
    assert search_steps(rugged, spread_starts(30, 5), 30, budget_of_evaluations=60, seed=4) == first


def test_moves_keep_the_steps_in_order() -> None:
    around = dict(moves((0, 1, 5), 7))
    assert set(around.values()) == {(0, 2, 5), (0, 1, 4), (0, 1, 6), (0, 2, 6)}
    first = next(moves((0, 1, 5), 7, last=("one", 2, 1)))
    assert first == (("one", 2, 1), (0, 1, 6))
    for seed in range(20):
        steps = kicked((0, 4, 9, 12), 15, random.Random(seed))
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


def test_all_that_is_wrong_with_starts_is_named() -> None:
    with pytest.raises(ValueError, match="budget_of_evaluations.*as many steps.*does not increase"):
        search_steps(distance, [(0, 2), (1, 2, 3)], 20, budget_of_evaluations=0)
    with pytest.raises(ValueError, match="at least one is needed"):
        search_steps(distance, [], 20, budget_of_evaluations=5)
    with pytest.raises(ValueError, match="at most 19"):
        search_steps(distance, [(0, 20)], 20, budget_of_evaluations=5)
